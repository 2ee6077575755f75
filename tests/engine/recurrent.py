"""What tests of recurrent states share: models to read with, ways to attend, and what must hold of every context."""

import torch

from longspan.attention import parse
from longspan.engine.index_context import IndexContext
from longspan.engine.kv_context import KVContext
from longspan.retrieval.heads import RetrievalHeads

FAMILIES = ("nemotron_h", "bamba", "falcon_h1", "lfm2")
"""Without RoPE and with experts; with RoPE; both kinds in every layer; convolutions alone."""
QUESTION = "What is the code of the tower?"
HEADS = RetrievalHeads(((0, 1), (1, 0), (1, 3)))
EVERYTHING = (
    "dense",
    "streaming:window=4096",
    "superlinear:window=4096",
    "quest",
    "tree:leaves=64",
    "retrieval:window=4096,read=place",
)
"""Ways of attending that read everything of a short text."""
SPECS = (
    "dense",
    "streaming:window=100,sinks=4",
    "superlinear:window=80,spans=2",
    "quest:budget=128,window=64",
    "tree:window=80,leaves=4",
    "retrieval:window=128,pages=2,read=place",
)


def new(model, spec="dense", **options):
    mechanism = parse(spec)
    if mechanism.name == "retrieval" and mechanism.read == "again":
        return IndexContext(model, mechanism, HEADS)
    return KVContext(model, mechanism, **options)


def plain_next(plain, tokens):
    """Logits after the last token when transformers reads everything at once."""
    with torch.inference_mode():
        return plain(torch.tensor([tokens]), logits_to_keep=1).logits[0, -1].float()


def whole(context):
    """Pages, states and tokens have read the same."""
    assert {kv.length for kv in context._layers()} <= {context.length}
    assert max(context.recurrence.positions, default=0) == context.length


def close(a, b, tolerance=2e-4):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
