"""Texts as vectors: each text by itself, behind a layer of the model, the same as transformers' own states."""

import pytest
import torch

from longspan.engine.embedding import Embedder
from longspan.errors import ModelError
from longspan.hf.loading import plain_transformers

TEXTS = [
    "The mill stands by the river.",
    "A bell",
    "",
    "Who built the old bridge over the river, and when was it?",
    "x",
]


def theirs(model, text, layer):
    tokens = model.tokens(text) or [min(model.end_tokens)]
    with torch.inference_mode():
        out = plain_transformers(model)(torch.tensor([tokens]), output_hidden_states=True)
    states = out.hidden_states[layer][0].float()
    return states[1:].mean(0) if len(tokens) > 1 else states[0]


@pytest.mark.parametrize("layer", [1, 2])
def test_vectors_are_the_means_of_the_models_own_states(tiny, layer):
    found = Embedder(tiny, layer)(TEXTS)
    assert found.dtype == torch.float32 and found.shape == (len(TEXTS), tiny.config.hidden_size)
    torch.testing.assert_close(found, torch.stack([theirs(tiny, text, layer) for text in TEXTS]), atol=2e-5, rtol=1e-4)


def test_a_texts_vector_does_not_depend_on_what_is_read_beside_it(tiny, monkeypatch):
    embed = Embedder(tiny)
    together = embed([*TEXTS, *TEXTS * 3])
    monkeypatch.setattr("longspan.engine.embedding.CHUNK", 30)
    torch.testing.assert_close(embed(TEXTS), together[: len(TEXTS)], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(together[5:10], together[15:20], atol=2e-5, rtol=1e-4)
    assert embed([]).shape == (0, tiny.config.hidden_size)


def test_long_texts_are_read_as_far_as_passages_go(tiny, monkeypatch):
    monkeypatch.setattr("longspan.engine.embedding._MOST", 8)
    start = tiny.decode(tiny.tokens(TEXTS[3])[:8])
    found = Embedder(tiny)([TEXTS[3], start])
    torch.testing.assert_close(found[0], found[1])


def test_layers_above_are_not_run_and_nothing_stays_hooked(tiny):
    ran = []
    layers = tiny.model.base_model.layers
    hooks = [layer.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, layer in enumerate(layers)]
    Embedder(tiny, 1)(["a few words"])
    for hook in hooks:
        hook.remove()
    assert ran == [0] and not any(layer._forward_pre_hooks for layer in layers)


@pytest.mark.parametrize("layer", [0, 3, 99])
def test_a_layer_that_is_not_there_is_told(tiny, layer):
    with pytest.raises(ModelError, match="plain layers"):
        tiny.states([1, 2], None, layer)
