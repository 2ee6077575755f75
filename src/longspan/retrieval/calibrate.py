"""Finding a model's retrieval heads, in some minutes, from text that every Python has.

Facts are put into stretches of the language reference, and the model is asked for each; a head is a retrieval head
if the page with the fact gets the largest share of its attention. Of the heads that find nearly everything, those in
the lower layers are taken: layers above the highest of them need never run while a context is being read.
It does not know where calibrations are stored: see `heads.py`.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from longspan.attention import make
from longspan.errors import ModelError
from longspan.hf.model import CausalModel
from longspan.kv.base import PAGE
from longspan.kv.pages import PagedKV, PagePool
from longspan.retrieval.choose import page_mass, token_mass
from longspan.retrieval.heads import Head, RetrievalHeads

Progress = Callable[[str, int, int], None]

_CONTEXTS, _LENGTH, _CHUNK, _SINKS = 4, 4096, 512, 4
_NEAR_BEST = 0.25
_MOST = 3

_PLACES = ("Oslo", "Lima", "Cairo", "Quito", "Delhi", "Hanoi", "Tunis", "Sofia", "Riga", "Accra", "Doha", "Perth")
_PEOPLE = ("Maria", "Peter", "Aisha", "Ivan", "Chen", "Fatima", "Lucas", "Olga", "Pedro", "Nadia", "Hugo", "Elena")
_THINGS = ("lantern", "compass", "violin", "kettle", "ladder", "mirror", "anchor", "basket", "helmet", "whistle")
_FORMS = (
    (
        "The key to the archive in {place} is number {number}.",
        "What is the number of the key to the archive in {place}?",
    ),
    ("{person} left a {thing} in the cellar of the museum.", "What did {person} leave in the cellar of the museum?"),
    ("The ferry to {place} departs from pier {number}.", "From which pier does the ferry to {place} depart?"),
    ("In the inventory the {thing} is listed under {number}.", "Under which number is the {thing} listed?"),
    ("{person} was born in a village near {place}.", "Where was {person} born?"),
    ("The winner of the {thing} contest was {person}.", "Who won the {thing} contest?"),
)


def calibrate(model: CausalModel, progress: Progress | None = None, *, seed: int = 0) -> RetrievalHeads:
    """Find the retrieval heads of a model.

    Args:
        model: any model that Longspan loads.
        progress: told how many tokens of how many were read.
        seed: of facts and places.

    Raises:
        ModelError: no head finds even half of the facts.
    """
    rng = random.Random(seed)
    length = min(_LENGTH, model.dimensions.window)
    texts = _filler(model, length * _CONTEXTS)
    ranked_first: list[Tensor] = []
    for i in range(_CONTEXTS):
        tokens, facts = _with_facts(model, texts[i * length : (i + 1) * length], rng)
        reader = _Everything(model)
        for start in range(0, len(tokens), _CHUNK):
            model.forward(tokens[start : start + _CHUNK], reader, state=reader.state)
            if progress:
                progress("calibrating", i * length + start + _CHUNK, _CONTEXTS * length)
        for question, pages in facts:
            ranked_first.append(_finders(model, reader, question, pages))
    rates = torch.stack(ranked_first).float().mean(0)  # [layers, query heads]
    return _select(rates)


def _select(rates: Tensor) -> RetrievalHeads:
    """Return the few best heads of the lowest layers that have good ones."""
    best = float(rates.max())
    if best < 0.5:
        raise ModelError(
            f"no retrieval head was found: the best ranks {best:.0%} of facts first (use another attention)"
        )
    good = [(int(layer), int(head)) for layer, head in (rates >= best - _NEAR_BEST).nonzero()]
    good.sort(key=lambda at: (-float(rates[at]), at[0]))
    if len(good) > _MOST:
        # The cheapest layers that still hold as many good heads as are wanted.
        depth = sorted(layer for layer, _ in good)[_MOST - 1]
        good = [at for at in good if at[0] <= depth][:_MOST]
    chosen = sorted(good)
    return RetrievalHeads(tuple(chosen), tuple(round(float(rates[at]), 4) for at in chosen), _SINKS)


def _filler(model: CausalModel, count: int) -> list[int]:
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    tokens = model.tokens(text)
    return (tokens * (1 + count // len(tokens)))[:count]


def _with_facts(
    model: CausalModel, filler: list[int], rng: random.Random
) -> tuple[list[int], list[tuple[str, set[int]]]]:
    """Return filler with a fact of every form in it, and each fact's question and pages."""
    forms = rng.sample(_FORMS, len(_FORMS))
    places, people, things = (rng.sample(words, len(forms)) for words in (_PLACES, _PEOPLE, _THINGS))
    out: list[int] = []
    facts = []
    step = len(filler) // len(forms)
    for i, (fact, question) in enumerate(forms):
        words = {"place": places[i], "person": people[i], "thing": things[i], "number": rng.randint(100, 99999)}
        cut = i * step + rng.randrange(step // 4, step)
        out.extend(filler[i * step : cut])
        start = len(out)
        out.extend(model.tokens(" " + fact.format(**words)))
        facts.append((question.format(**words), set(range(start // PAGE, (len(out) - 1) // PAGE + 1))))
        out.extend(filler[cut : (i + 1) * step])
    return out, facts


def _finders(model: CausalModel, reader: _Everything, question: str, pages: set[int]) -> Tensor:
    """Return which heads rank one of the pages first: bool `[layers, query heads]`."""
    sizes = model.dimensions
    group = sizes.query_heads // sizes.kv_heads
    length = reader.layers[0].length
    reader.queries.clear()
    model.forward(model.tokens(f"\n\nQuestion: {question}\nAnswer:"), reader, state=dict(reader.state))
    for kv in reader.layers:
        kv.truncate(length)
    found = torch.zeros(sizes.layers, sizes.query_heads, dtype=torch.bool)
    for layer, kv in enumerate(reader.layers):
        keys = kv.keys(0, length)[0]
        heads: dict[Head, Tensor] = {(layer, h): reader.queries[layer][h] for h in range(sizes.query_heads)}
        mass = page_mass(token_mass(heads, {at: keys[at[1] // group] for at in heads}, sinks=_SINKS))
        found[layer] = torch.tensor([int(best) in pages for best in mass.argmax(1)])
    return found


class _Everything:
    """A reader that keeps every layer's keys, attends by a window, and notes the newest queries."""

    def __init__(self, model: CausalModel) -> None:
        sizes = model.dimensions
        self.mechanism = make("streaming", window=1024, sinks=_SINKS)
        self.queries: dict[int, Tensor] = {}
        self.state: dict[str, Tensor] = {}
        self.layers = [
            PagedKV(PagePool(sizes.kv_heads, sizes.head_dim, sizes.head_dim, model.dtype, model.device), rotary)
            for rotary in model.rotaries
        ]
        self.mechanisms = [make("streaming", window=w, sinks=0) if w else self.mechanism for w in model.windows]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        self.queries[layer] = q[0].float() * scale
        kv = self.layers[layer]
        kv.append(k, v)
        return self.mechanisms[layer].attend(q, kv, scale=scale)
