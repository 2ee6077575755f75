"""What is read for one answer after which context, and how it is taken back.

It does not know how an answer is sampled, nor when its turn is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType

from torch import Tensor

from longspan.attention import Hints, Mechanism, make
from longspan.engine import prompts, quoting, rereading, sources
from longspan.engine.choosing import Chosen
from longspan.engine.contexts import Context
from longspan.engine.index_context import IndexContext
from longspan.engine.kv_context import KVContext
from longspan.engine.sources import Noted
from longspan.hf.model import CausalModel
from longspan.retrieval.heads import RetrievalHeads
from longspan.sessions.session import Session, Turn


@dataclass
class Prompted:
    """A prompt, and the context that it is read after; at the end of a `with` block it is taken back."""

    context: KVContext
    tokens: list[int]
    """Of the prompt."""
    remembered: int = 0
    """Tokens that were read before, whether `context` holds them or an index does."""
    hints: Hints = field(default_factory=Hints)
    """What the mechanism is told as long as the answer is written."""
    read_again: list[str] = field(default_factory=list)
    """Texts that the prompt repeats, best first."""
    best: list[str] = field(default_factory=list)
    """Sentences that matter most for the question."""
    before: int = 0
    """Length of the context without the prompt."""

    def __enter__(self) -> KVContext:
        """Tell the mechanism what was chosen."""
        self.before, self.context.hints = self.context.length, self.hints
        return self.context

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Take everything back that was read since."""
        try:
            self.context.truncate(self.before)
        finally:
            self.context.hints, self.context.noted = Hints(), None

    def note(self, heads: RetrievalHeads | None) -> None:
        """Have these heads' queries noted from now on, for `mass`; None: nobody asks."""
        self.context.noted = None if heads is None else Noted([layer for layer, _ in heads.heads])

    def mass(self, heads: RetrievalHeads | None, written_on: KVContext | None = None) -> Tensor | None:
        """Return the attention mass of every token as what follows the prompt was written (`sources.mass`).

        Args:
            heads: that were noted; None: nobody asked.
            written_on: a fork of the context, where that is what an answer was written on.
        """
        context = self.context if written_on is None else written_on
        if heads is None or context.noted is None:
            return None
        return sources.mass(context, context.noted, heads, context.length - self.before - len(self.tokens) + 1)

    def room(self, wanted: int) -> tuple[int, list[str]]:
        """Return how many tokens an answer of `wanted` may have, before the prompt is read, and what to say of it."""
        taken = self.context.window_taken
        room = self.context.model.dimensions.window - len(self.tokens) - taken
        if room < 1 and taken:
            return wanted, ["the context is longer than the window the model was trained on: expect nonsense"]
        return room, []


def without_documents(model: CausalModel, mechanism: Mechanism, question: str, turns: Sequence[Turn]) -> Prompted:
    """Return what is read for a question of a conversation without documents (ContextTooLongError: it does not fit)."""
    plain = (prompts.plain(model, question, some) for some in rereading.shorter(turns))
    tokens = rereading.fitting(model, plain)
    return Prompted(KVContext(model, mechanism), tokens)


def about_documents(
    model: CausalModel, session: Session, chosen: Chosen, question: str, turns: Sequence[Turn]
) -> Prompted:
    """Return what is read for a question about a session's documents.

    Args:
        model: that has read them.
        session: with its memory.
        chosen: what matters for the question.
        question: what is asked.
        turns: the conversation before it.

    Raises:
        ContextTooLongError: the question does not fit the model's window.
    """
    context: Context = session.memory
    best = chosen.clear(session, quoting.MOST, question)
    if isinstance(context, IndexContext):
        tokens, read_again = rereading.prompt_again(model, context.wanted, session, chosen, question, turns)
        scratch = KVContext(model, make("dense"))
        return Prompted(
            scratch, tokens, context.length, read_again=read_again, best=read_again if context.wanted.focus else best
        )
    assert isinstance(context, KVContext), "a context is an index or a KV context"
    options = (prompts.after_documents(model, question, some) for some in rereading.shorter(turns))
    tokens = rereading.fitting(model, options)
    hints = Hints(chosen_pages=tuple(choice.page for choice in chosen.pages))
    return Prompted(context, tokens, context.length, hints, best=best)
