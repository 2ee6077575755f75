"""A tiny model whose attention is known: its first two heads look at every token of a `#`, from everywhere."""

import torch

from longspan.hf.loading import load
from longspan.retrieval.heads import RetrievalHeads
from tiny_llama import WINDOW, save_model

HEADS = RetrievalHeads(((0, 0), (0, 1)))
MARKED = "The gate ## has the code ## 7315 ##."
PLAIN = "Lise keeps the spare key."


def looking_model(path):
    """Save it in a folder, and load it."""
    folder = save_model(path, max_position_embeddings=WINDOW)
    model = load(str(folder), device="cpu", dtype=torch.float32)
    marks = sorted(
        {token for text in ("#", "##", " ##", " #") for token in model.tokens(text)} - set(model.tokens(" "))
    )
    base = model.model.base_model
    with torch.no_grad():
        embedding, attention = base.embed_tokens.weight, base.layers[0].self_attn
        embedding[:, 30], embedding[:, 31] = 2.0, 0.0
        embedding[marks, 31] = 6.0
        base.layers[0].input_layernorm.weight.fill_(1.0)
        for weight in (attention.q_proj.weight, attention.k_proj.weight):
            weight[: weight.shape[0] // 2] = 0.0
        # The slowest pair of channels turns by a thousandth a token: it knows no distance here.
        attention.q_proj.weight[[3, 11], 30] = 12.0
        attention.k_proj.weight[3, 31] = 6.0
    return model
