"""Asks a model of ours: its context is read first, then what stands after it.

The prompt is the example's within the model's chat template: context and question are the user's, the answer prefix
begins the model's turn, and nothing is said by us. Retrieval that reads again what it chose (`read=again`) writes the
engine's own prompt instead, with the same question and answer prefix. It does not know how examples are made.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy

from longspan.attention import Hints, make
from longspan.attention.retrieval import Retrieval
from longspan.engine import prompts, rereading
from longspan.engine.generation import Answer, Stats, decode
from longspan.engine.index_context import IndexContext
from longspan.engine.kv_context import KVContext
from longspan.engine.llm import LLM
from longspan.engine.sampler import SamplingParams
from longspan.errors import UsageError
from longspan.evals.asking.asker import Identity, Reply, Tick
from longspan.evals.questions.example import Example, Template
from longspan.evals.questions.scoring import score
from longspan.hf.model import CausalModel
from longspan.sessions.session import Session


def template_of(model: CausalModel) -> Template:
    """Return what a model's prompts have around a question's parts."""
    before, between = prompts.bare(model)
    return Template(before, between) if between else Template()


class Local:
    """A model here, in one way of attending: see `asker.Asker`."""

    parallel = 1
    chooses = True

    def __init__(self, llm: LLM, kv: str = "auto", mechanism: str | None = None, budget: str = "") -> None:
        """Take an engine.

        Args:
            llm: its model is asked, as it attends and keeps keys and values.
            kv: the format of keys and values as the engine was told.
            mechanism: how it attends as it was asked for, before a budget set options; None: as the engine says.
            budget: see `Identity`.
        """
        self.llm = llm
        attention = "auto" if llm.attention is None else llm.attention.describe()
        self.identity = Identity(
            model=llm.model.name,
            fingerprint=llm.model.fingerprint,
            dtype=str(llm.model.dtype).removeprefix("torch."),
            mechanism=attention if mechanism is None else mechanism,
            budget=budget,
            attention=attention,
            prefill="" if llm.prefill_by is None else llm.prefill_by.describe(),
            kv=kv,
            kv_budget=llm.kv_budget.limit or 0,
        )
        self.template = template_of(llm.model)
        self.counted_by = llm.model.tokenizer_hash

    @property
    def measures(self) -> bool:
        """Whether the probability of a text can be returned: an index alone gives none."""
        return not isinstance(self.llm.new_context(self.llm.attention or make("dense")), IndexContext)

    def tokens(self, text: str) -> Sequence[object]:
        """See `Asker`."""
        return self.llm.model.tokens(text)

    def choose(self, text: str, question: str) -> list[tuple[int, int]]:
        """See `Asker`: the sentences that the model's retrieval heads rank best, with words beside them."""
        session = Session()
        tokens, offsets = self.llm.model.tokens_with_offsets(text)
        session.add_document("text", text, tokens, offsets, [])
        context = session.memory = IndexContext(self.llm.model, Retrieval(), self.llm.heads())
        try:
            context.extend(session.tokens)
            return [(each.start, each.end) for each in self.llm.choose(question, session).sentences]
        finally:
            context.free()

    def ask(self, example: Example, tick: Tick = lambda _, __: None) -> Reply:
        """See `Asker`."""
        llm, model = self.llm, self.llm.model
        session = llm.session()
        llm.add_text(session, example.context)
        mechanism = llm.mechanism_for(session)
        context = session.memory = llm.new_context(mechanism)
        again = isinstance(context, IndexContext)
        head = [] if again else model.tokens(example.template.before)
        session.head = len(head)
        tokens = head + session.tokens
        answer = Answer("", [], Stats(), "", mechanism.describe(), model.name)
        nll: float | None = None
        try:
            started = time.perf_counter()
            context.extend(tokens, lambda _: tick(context.length, len(tokens)))
            asked, kept = time.perf_counter(), context.nbytes
            if isinstance(context, IndexContext):
                reader, suffix = self._again(context, session, example)
            else:
                assert isinstance(context, KVContext), "a context is an index or a KV context"
                suffix = model.tokens(example.follows or example.closing)
                room = 0 if example.follows else example.max_tokens
                assert len(tokens) + len(suffix) + room == example.tokens, "made for another template"
                reader = context
                if mechanism.wanted_pages:
                    chosen = llm.choose(example.question, session)
                    reader.hints = Hints(chosen_pages=tuple(choice.page for choice in chosen.pages))
            if example.follows:
                nll = _nll(reader, suffix)
            else:
                self._write(reader, suffix, example, answer, asked)
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
            nll=nll,
        )

    def _again(self, context: IndexContext, session: Session, example: Example) -> tuple[KVContext, list[int]]:
        """Return a context for what retrieval reads again, and the tokens that it reads."""
        model = self.llm.model
        if example.follows:
            raise UsageError("an index alone gives no probability of a text: leave retrieval out, or add read=place")
        chosen = self.llm.choose(example.question, session)
        suffix, _ = rereading.prompt_again(model, context.wanted, session, chosen, example.question)
        return KVContext(model, make("dense")), suffix + model.tokens(example.answer_prefix)

    def _write(self, reader: KVContext, suffix: list[int], example: Example, answer: Answer, asked: float) -> None:
        """Read what stands after the context, and write an answer until it could not become better."""
        params = SamplingParams(max_tokens=example.max_tokens)
        logits = reader.step(suffix)
        for _ in decode(self.llm.model, logits, reader.step, params, answer, asked, example.max_tokens):
            if score(answer.text, example.outputs, example.scoring) == 1:
                break


def _nll(reader: KVContext, tokens: list[int]) -> float:
    """Return the mean negative log-likelihood of the tokens after the first."""
    logits = reader.score(tokens)
    wanted = torch.tensor(tokens[1:], device=logits.device)
    return float(cross_entropy(logits[:-1], wanted))
