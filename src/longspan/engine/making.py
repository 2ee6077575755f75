"""What an engine is made of: a model, a way to attend, where contexts are kept, and the contexts themselves.

It does not read or answer: `llm.py` does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from longspan import settings
from longspan.attention import Mechanism, make, parse
from longspan.attention.retrieval import Retrieval
from longspan.engine import prompts, rereading, saving
from longspan.engine.choosing import Chooser
from longspan.engine.contexts import Context
from longspan.engine.index_context import IndexContext
from longspan.engine.kv_context import KVContext
from longspan.engine.ranked_context import RankedContext, check
from longspan.engine.ranks import Ranks, join
from longspan.errors import ModelError, UsageError
from longspan.hf import adapter as adapters
from longspan.hf.loading import load
from longspan.hf.model import CausalModel
from longspan.kv import formats
from longspan.kv.budget import Budget
from longspan.kv.tiers import TierLimits, Tiers
from longspan.retrieval import heads as heads_store
from longspan.retrieval.calibrate import calibrate
from longspan.retrieval.heads import RetrievalHeads
from longspan.sessions.session import Session
from longspan.sessions.store import JSON, SessionStore

Progress = Callable[[str, int, int], None]
"""Told what is being done, how many tokens are done, and how many there are."""

INDEX_ALONE = (
    "retrieval keeps no keys and values but its index: leave out --prefill, --kv, --kv-budget and --kv-tier, or give "
    "an attention that keeps them, such as --attention quest"
)
_AUTO = "auto"


class Contexts:
    """A model with a way to attend, and what it makes to remember by."""

    def __init__(
        self,
        model: str | CausalModel | None = None,
        attention: str | Mechanism | None = None,
        device: str = "auto",
        dtype: torch.dtype | None = None,
        *,
        prefill: str | Mechanism | None = None,
        kv: str = formats.AUTO,
        kv_budget: int | None = None,
        kv_tier: str | TierLimits | None = None,
        weights: str = "auto",
        adapter: str | None = None,
        quote: bool = True,
        sources: bool = True,
        store: SessionStore | None = None,
        reuse: bool = True,
        parallel: str | Ranks | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Load a model.

        Args:
            model: a short name, a hub name, a folder or a GGUF file; None: the default (`LONGSPAN_MODEL`).
            attention: a specification such as `superlinear:window=2024`, a mechanism, or None: dense as long as the
                context fits the window that the model was trained on, retrieval beyond.
            device: `auto`, `cpu` or `cuda`.
            dtype: None: chosen for the device.
            prefill: by what documents are read, such as `xattention:threshold=0.9`; None: by `attention`, or densely
                where that chooses for answers only.
            kv: how keys and values are kept: `fp32`, `fp16`, `bf16`, `fp8`, `int8`, `int4`, `int2`, with options such
                as `int4:group=64` (docs/kv_formats.md); `auto`: as the model computes.
            kv_budget: bytes that the keys and values of all sessions may take together; None: no limit.
            kv_tier: where pages move that the budget does not hold, and are read from: `host=8GiB,disk=50GiB:FOLDER`,
                either part alone or both; None: what needs more than the budget is refused.
            weights: how weights are read in decode on a CPU: `auto`, `own` or `int8` (see `hf.loading.load`); a model
                that is given knows it already.
            adapter: the folder of an adapter that `longspan convert` or `extend` trained on this model; it attends by
                the mechanism of its training unless `attention` names another.
            quote: whether the text is quoted after an answer whose own words are not in it (see `Answer.quote`).
            sources: whether attention tells which sentences an answer was read from (docs/citations.md).
            store: where sessions are saved; None: the user's folder.
            reuse: whether documents that begin as a saved session does start from there, whichever session asks.
            parallel: how contexts lie over the ranks that torchrun started: `auto`, `sharded`, or ranks that were
                joined already; None: on this process alone. Every rank makes the same engine; all but rank 0 then
                call `follow`.
            say: told in a line what takes long.

        Raises:
            UnknownNameError: unknown model, mechanism or option.
            ModelError: the model can't be loaded or run.
            UsageError: no such device or way to read weights, or a format that the number type can't hold.
        """
        name = model or settings.default_model()
        if adapter is not None:
            if not isinstance(name, str):
                raise UsageError("an adapter is loaded with its model: give the model's name")
            attention = attention or adapters.read(adapter).attention
        chosen = None if attention in (None, _AUTO) else parse(attention)
        self.ranks = join(parallel, device) if isinstance(parallel, str) else parallel
        """Who shares contexts; None: nobody."""
        if self.ranks is not None:
            chosen = make("dense") if chosen is None else chosen
            check(chosen, None if prefill is None else parse(prefill))
            if kv != formats.AUTO or kv_budget is not None or kv_tier is not None:
                raise UsageError("several ranks keep pages as they come: leave out --kv, --kv-budget and --kv-tier")
        if kv_tier is not None and kv_budget is None:
            raise UsageError("--kv-tier is for pages that a budget does not hold: give --kv-budget as well")
        limits = TierLimits.parse(kv_tier) if isinstance(kv_tier, str) else kv_tier
        self.tiers = None if limits is None else Tiers(limits)
        """Where pages lie that the budget does not hold, and what moved; None: nowhere."""
        self.prefill_by = None if prefill is None else parse(prefill)
        self._keeps_as_asked = prefill is not None or kv != formats.AUTO or kv_budget is not None
        if self._keeps_as_asked and _reads_again(chosen):
            raise UsageError(INDEX_ALONE)
        if (count := settings.threads()) is not None:
            torch.set_num_threads(count)
        if isinstance(name, str):
            name = load(name, device=device, dtype=dtype, weights=weights, adapter=adapter, say=say)
        self.model = name
        if self.ranks is not None and self.ranks.shares_experts:
            self.model.share_experts(self.ranks.group)
        self.attention: Mechanism | None = chosen
        self._kv_format = None if kv == formats.AUTO else formats.format_of(kv, self.model.dtype).describe()
        self.kv_budget = Budget(kv_budget, "KV")
        self.quote, self.sources = quote, sources
        """Whether the text is quoted, and whether attention names sources (see above)."""
        self.store = store or SessionStore()
        self.reuse = reuse
        self._say = say
        self._heads: RetrievalHeads | None = None
        self._headless = False
        self._chooser = Chooser(self.model)
        if not _reads_again(chosen) and self.ranks is None:
            # Options that do not go together are refused now, not after documents were read.
            self.new_context(chosen or make("dense"))

    def follow(self) -> bool:
        """Work for rank 0 until it ends, on every other rank.

        Returns:
            Whether it did; False, at once, on rank 0 and where there is but one process.

        Raises:
            ParallelError: rank 0, or another, is gone.
        """
        if self.ranks is None or self.ranks.leads:
            return False
        ranks = self.ranks
        ranks.follow(self.model, lambda attention, prefill: RankedContext(self.model, attention, ranks, prefill))
        return True

    def close(self) -> None:
        """Let the other ranks go; contexts over ranks can't be read from afterwards."""
        if self.ranks is not None:
            self.ranks.end()

    def heads(self, progress: Progress | None = None) -> RetrievalHeads:
        """Return the model's retrieval heads, calibrating it first if that was never done."""
        if self._heads is None:
            self._heads = heads_store.stored(self.model.fingerprint)
        if self._heads is None:
            self._say(f"looking for the retrieval heads of {self.model.name} (once)")
            self._heads = calibrate(self.model, progress)
            try:
                heads_store.store(self.model.fingerprint, self._heads, {"model": self.model.name})
            except ModelError as error:  # found all the same: this process can work with them
                self._say(f"{error}: the next call looks for them again")
        return self._heads

    def heads_or_none(self) -> RetrievalHeads | None:
        """Return the retrieval heads, or None for a model in which none are found: words alone then choose."""
        if self._headless:
            return None
        try:
            return self.heads()
        except ModelError:
            self._headless = True
            return None

    def mechanism_for(self, session: Session) -> Mechanism:
        """Return the mechanism for this session's documents."""
        if self.attention is not None:
            return self.attention
        return make("dense") if self._fits(len(session.tokens)) else make("retrieval")

    def _fits(self, tokens: int) -> bool:
        """Return whether documents of so many tokens leave room in the window for a question and its answer."""
        return tokens + 2 * rereading.ANSWER_ROOM <= self.model.dimensions.window

    def without_documents(self) -> Mechanism:
        """Return the mechanism for a conversation without documents: retrieval has nothing to choose from there."""
        named = self.attention
        return make("dense") if named is None or isinstance(named, Retrieval) else named

    def _identity(self) -> dict[str, JSON]:
        """Return what a saved session must agree with."""
        return saving.identity(self.model, self.attention, self.prefill_by, self._kv_format)

    def _memory(self, session: Session, mechanism: Mechanism, progress: Progress | None) -> Context:
        """Return the session's context, a new one where the mechanism changed as documents were added."""
        memory: Context | None = session.memory
        if memory is None or context_mechanism(memory) != mechanism:
            memory = session.memory = self.new_context(mechanism, progress)
            session.saved_length = -1
            session.head = 0 if isinstance(memory, IndexContext) else len(prompts.before_documents(self.model))
        return memory

    def new_context(self, mechanism: Mechanism, progress: Progress | None = None) -> Context:
        """Return an empty context that attends by a mechanism (calibrating the model if retrieval needs it)."""
        if isinstance(mechanism, Retrieval) and _reads_again(mechanism):
            if self._keeps_as_asked:
                raise UsageError(INDEX_ALONE)
            return IndexContext(self.model, mechanism, self.heads(progress))
        if self.ranks is not None:
            return RankedContext(self.model, mechanism, self.ranks, self.prefill_by)
        return KVContext(
            self.model,
            mechanism,
            self.prefill_by,
            kv_format=self._kv_format,
            budget=Budget(None, "session's KV", self.kv_budget),
            tiers=self.tiers,
        )

    def _context_tokens(self, session: Session, context: Context) -> list[int]:
        """Return all tokens that the session's context should hold."""
        if isinstance(context, IndexContext):
            return session.tokens
        return prompts.before_documents(self.model) + session.tokens


def _reads_again(mechanism: Mechanism | None) -> bool:
    """Return whether a mechanism keeps an index alone and reads again what is chosen by it."""
    return isinstance(mechanism, Retrieval) and mechanism.read == "again"


def context_mechanism(context: Context) -> Mechanism:
    """Return the mechanism that a context was made for (an index reads by a window on its behalf)."""
    return context.wanted if isinstance(context, IndexContext) else context.mechanism
