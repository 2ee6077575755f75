"""Asks a model of ours: its context is read first, then what stands after it.

The prompt is the example's within the model's chat template: context and question are the user's, the answer prefix
begins the model's turn, and nothing is said by us. Retrieval that reads again what it chose (`read=again`) writes the
engine's own prompt instead, with the same question and answer prefix. It does not know how examples are made.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import cross_entropy

from longspan.attention import Hints, make
from longspan.attention.retrieval import Retrieval
from longspan.engine import prompts, rereading
from longspan.engine.contexts import Context
from longspan.engine.embedding import Embedder
from longspan.engine.generation import Answer, Stats, decode
from longspan.engine.index_context import IndexContext
from longspan.engine.kv_context import KVContext
from longspan.engine.llm import LLM
from longspan.engine.sampler import SamplingParams
from longspan.engine.stops import TextStream
from longspan.errors import UsageError
from longspan.evals.asking.asker import Identity, Reply, Tick
from longspan.evals.questions.example import Example, Template
from longspan.evals.questions.scoring import score
from longspan.evals.together import continued
from longspan.hf.model import CausalModel
from longspan.retrieval.dense import DenseIndex
from longspan.sessions.session import Session

_TOGETHER = {"cpu": 1, "cuda": 16}
"""Questions whose answers are written together: a GPU takes as long for a token of one as for one of each."""
_STACKED = {"cpu": 1 << 30, "cuda": 8 << 30}
"""Bytes of keys and values that may wait to be answered from together; memory takes about twice as many."""


def template_of(model: CausalModel) -> Template:
    """Return what a model's prompts have around a question's parts."""
    before, between = prompts.bare(model)
    return Template(before, between) if between else Template()


class Local:
    """A model here, in one way of attending: see `asker.Asker`."""

    parallel = 1
    chooses = True

    def __init__(
        self,
        llm: LLM,
        kv: str = "auto",
        mechanism: str | None = None,
        budget: str = "",
        *,
        together: int | None = None,
        stacked: int | None = None,
    ) -> None:
        """Take an engine.

        Args:
            llm: its model is asked, as it attends and keeps keys and values.
            kv: the format of keys and values as the engine was told.
            mechanism: how it attends as it was asked for, before a budget set options; None: as the engine says.
            budget: see `Identity`.
            together: questions whose answers are written side by side; None: as `_TOGETHER` says.
            stacked: bytes of keys and values from which answers are written at once; None: as `_STACKED` says.
        """
        self.llm = llm
        on = "cuda" if llm.model.device.type == "cuda" else "cpu"
        # Pages that give way to others are settled before every step of a context of its own.
        self.together = 1 if llm.kv_budget.limited else together or _TOGETHER[on]
        self._stacked = stacked or _STACKED[on]
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

    def alike(self, texts: Sequence[str], question: str) -> list[int]:
        """See `Asker`."""
        *passages, asked = Embedder(self.llm.model)([*texts, question])
        return DenseIndex(torch.stack(passages)).ranking(asked)

    def ask(self, example: Example, tick: Tick = lambda _, __: None) -> Reply:
        """See `Asker`."""
        begun = self._begin(example, tick)
        answer = Answer("", [], Stats(), "", begun.attention, self.llm.model.name)
        nll: float | None = None
        try:
            if example.follows:
                nll = _nll(begun.reader, begun.suffix)
            else:
                self._write(begun.reader, begun.suffix, example, answer, begun.asked)
        finally:
            begun.free()
        return begun.reply(answer.text, answer.stats, nll)

    def ask_all(self, examples: Sequence[Example], tick: Tick = lambda _, __: None) -> list[Reply]:
        """See `Asker`: contexts are read one by one, and answers written together, as many as bytes allow."""
        replies: list[Reply] = []
        waiting: list[_Begun] = []
        try:
            for example in examples:
                if example.follows:
                    replies += self._written(waiting)
                    replies.append(self.ask(example, tick))
                    continue
                begun = self._begin(example, tick)
                waiting.append(begun)
                begun.first = int(begun.reader.step(begun.suffix).argmax())
                begun.first_seconds = time.perf_counter() - begun.asked
                if sum(each.nbytes for each in waiting) >= self._stacked:
                    replies += self._written(waiting)
            replies += self._written(waiting)
        finally:
            for begun in waiting:
                begun.free()
        return replies

    def _begin(self, example: Example, tick: Tick) -> _Begun:
        """Read an example's context; what is to be read after it comes with it."""
        llm, model = self.llm, self.llm.model
        session = llm.session()
        llm.add_text(session, example.context)
        mechanism = llm.mechanism_for(session)
        context = session.memory = llm.new_context(mechanism)
        again = isinstance(context, IndexContext)
        head = [] if again else model.tokens(example.template.before)
        session.head = len(head)
        tokens = head + session.tokens
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
        except BaseException:
            context.free()
            raise
        return _Begun(example, mechanism.describe(), context, reader, len(tokens), suffix, started, asked, kept)

    def _again(self, context: IndexContext, session: Session, example: Example) -> tuple[KVContext, list[int]]:
        """Return a context for what retrieval reads again, and the tokens that it reads."""
        model = self.llm.model
        if example.follows:
            raise UsageError("an index alone gives no probability of a text: leave retrieval out, or add read=place")
        chosen = self.llm.choose(example.question, session)
        suffix, _ = rereading.prompt_again(model, context.wanted, session, chosen, example.question, session.turns)
        return KVContext(model, make("dense")), suffix + model.tokens(example.answer_prefix)

    def _write(self, reader: KVContext, suffix: list[int], example: Example, answer: Answer, asked: float) -> None:
        """Read what stands after the context, and write an answer until it could not become better."""
        params = SamplingParams(max_tokens=example.max_tokens)
        logits = reader.step(suffix)
        for _ in decode(self.llm.model, logits, reader.step, params, answer, asked, example.max_tokens):
            if score(answer.text, example.outputs, example.scoring) == 1:
                break

    def _written(self, waiting: list[_Begun]) -> list[Reply]:
        """Write the answers of contexts whose questions were read, free them, and leave none waiting."""
        if not waiting:
            return []
        model = self.llm.model
        answers = [_Writing(model, begun.example) for begun in waiting]
        continued(
            model,
            [begun.reader for begun in waiting],
            [begun.first for begun in waiting],
            max(begun.example.max_tokens for begun in waiting),
            lambda i, tokens: answers[i].over(tokens[-1]),
        )
        replies = [
            begun.reply(each.text, each.stats(begun), None) for begun, each in zip(waiting, answers, strict=True)
        ]
        told = {"together": float(len(waiting))} if len(waiting) > 1 else {}
        for begun in waiting:
            begun.free()
        waiting.clear()
        return [replace(reply, measures=told) for reply in replies]


@dataclass
class _Begun:
    """A question whose context was read."""

    example: Example
    attention: str
    context: Context
    reader: KVContext
    """What reads the question: the context itself, or one for what retrieval reads again."""
    count: int
    """Tokens of the context."""
    suffix: list[int]
    started: float
    asked: float
    """When the context was read, in seconds of `time.perf_counter`."""
    kept: int
    first: int = 0
    """The answer's first token."""
    first_seconds: float = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values that were read: memory of what was evicted is set aside until the end."""
        sizes, model = self.context.model.dimensions, self.context.model
        tokens = self.count + len(self.suffix) + self.example.max_tokens
        return int(tokens * sizes.layers * sizes.shape(model.dtype.itemsize).token_bytes)

    def free(self) -> None:
        """Give every page back."""
        self.reader.free()
        if self.context is not self.reader:
            self.context.free()

    def reply(self, text: str, stats: Stats, nll: float | None) -> Reply:
        """Return the reply with this text."""
        model, again = self.context.model, self.context is not self.reader
        most = self.count + len(self.suffix)
        return Reply(
            text=text,
            attention=self.attention,
            beyond=not self.reader.beyond_window and most > model.dimensions.window and not again,
            read_tokens=self.count,
            read_seconds=self.asked - self.started,
            kept_bytes=self.kept,
            first_token_seconds=stats.first_token_seconds,
            decoded_tokens=stats.decoded_tokens,
            decode_seconds=stats.decode_seconds,
            nll=nll,
        )


class _Writing:
    """One of several answers that are written together."""

    def __init__(self, model: CausalModel, example: Example) -> None:
        """Begin an answer."""
        self._ends, self._example, self._stream = model.end_tokens, example, TextStream(model.decode)
        self.text = ""
        self._count, self._began, self._seconds = 0, time.perf_counter(), 0.0

    def over(self, token: int) -> bool:
        """Take the next token; return whether the answer ends with it, as `decode` and `_write` would have it."""
        example = self._example
        if token in self._ends:
            self.text += self._stream.finish()
            return True
        self._count += 1
        self._seconds = time.perf_counter() - self._began
        if piece := self._stream.push(token):
            self.text += piece
            if score(self.text, example.outputs, example.scoring) == 1:
                return True
        if self._count < example.max_tokens:
            return False
        self.text += self._stream.finish()
        return True

    def stats(self, begun: _Begun) -> Stats:
        """Return tokens and seconds; those of others that were written at the same time are among the latter."""
        return Stats(decoded_tokens=self._count, decode_seconds=self._seconds, first_token_seconds=begun.first_seconds)


def _nll(reader: KVContext, tokens: list[int]) -> float:
    """Return the mean negative log-likelihood of the tokens after the first."""
    logits = reader.score(tokens)
    wanted = torch.tensor(tokens[1:], device=logits.device)
    return float(cross_entropy(logits[:-1], wanted))
