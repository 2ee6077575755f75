"""Asks a model of ours one example: its context is read before the question is known.

The prompt is RULER's within the model's chat template: context and question are the user's, the answer prefix begins
the model's turn, and nothing is said by us. Retrieval that reads again what it chose (`read=again`) writes the engine's
own prompt instead, with the same question and answer prefix. It does not know how examples are made.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from longspan.attention import Hints, make
from longspan.engine import prompts, rereading
from longspan.engine.generation import Answer, Stats, decode
from longspan.engine.index_context import IndexContext
from longspan.engine.kv_context import KVContext
from longspan.engine.llm import LLM
from longspan.engine.sampler import SamplingParams
from longspan.evals.ruler.example import Example, Template
from longspan.evals.ruler.scoring import score
from longspan.evals.ruler.tasks import after
from longspan.hf.model import CausalModel

Tick = Callable[[int, int], None]
"""Told how many tokens of the context are read, and how many there are."""


@dataclass(frozen=True)
class Reply:
    """What a model answered, and how fast."""

    text: str
    """Without the answer prefix. It ends where nothing more could raise its score."""
    attention: str
    """The mechanism that read."""
    beyond: bool
    """Whether the mechanism reads positions that the model was not trained on."""
    read_tokens: int
    read_seconds: float
    kept_bytes: int
    """Of what is kept of the context, before the question is read."""
    first_token_seconds: float
    """From the end of reading to the first token of the answer."""
    decoded_tokens: int
    decode_seconds: float


def template_of(model: CausalModel) -> Template:
    """Return what a model's prompts have around a question's parts."""
    before, between = prompts.bare(model)
    return Template(before, between) if between else Template()


def ask(llm: LLM, example: Example, template: Template, tick: Tick = lambda _, __: None) -> Reply:
    """Read an example's context, then ask its question; greedy.

    Args:
        llm: its model, and how it attends and keeps keys and values.
        example: made for the model's tokenizer and `template`.
        template: see `template_of`.
        tick: see `Tick`.
    """
    model = llm.model
    session = llm.session()
    llm.add_text(session, example.context)
    mechanism = llm.mechanism_for(session)
    context = session.memory = llm.new_context(mechanism)
    again = isinstance(context, IndexContext)
    head = [] if again else model.tokens(template.before)
    session.head = len(head)
    tokens = head + session.tokens

    def read(_: int) -> None:
        tick(context.length, len(tokens))

    answer = Answer("", [], Stats(), "", mechanism.describe(), model.name)
    try:
        started = time.perf_counter()
        context.extend(tokens, read)
        asked, kept = time.perf_counter(), context.nbytes
        if isinstance(context, IndexContext):
            chosen = llm.choose(example.question, session)
            suffix, _ = rereading.prompt_again(model, context.wanted, session, chosen, example.question)
            suffix += model.tokens(example.answer_prefix)
            reader = KVContext(model, make("dense"))
        else:
            suffix = model.tokens(after(example, template))
            assert len(tokens) + len(suffix) + example.max_tokens == example.tokens, "made for another template"
            assert isinstance(context, KVContext), "a context is an index or a KV context"
            reader = context
            if mechanism.wanted_pages:
                chosen = llm.choose(example.question, session)
                reader.hints = Hints(chosen_pages=tuple(choice.page for choice in chosen.pages))
        logits = reader.step(suffix)
        params = SamplingParams(max_tokens=example.max_tokens)
        for _ in decode(model, logits, reader.step, params, answer, asked, example.max_tokens):
            if score(answer.text, example.outputs, part=example.part) == 1:
                break
    finally:
        context.free()
    stats = answer.stats
    return Reply(
        text=answer.text,
        attention=answer.attention,
        beyond=not reader.beyond_window and len(tokens) + len(suffix) > model.dimensions.window and not again,
        read_tokens=len(tokens),
        read_seconds=asked - started,
        kept_bytes=kept,
        first_token_seconds=stats.first_token_seconds,
        decoded_tokens=stats.decoded_tokens,
        decode_seconds=stats.decode_seconds,
    )
