"""Decoding one token after another through a native model: on a GPU every step is the replay of one CUDA graph.

A step reads token, length, page tables and recurrent states from tensors that stay where they are, writes the new
token's keys and values to its pages, and puts the next token (the likeliest, or one that is drawn) where the next step
reads it. The host only sees to it that there is a page for every token, before the step. A graph holds for one context,
mechanism and capacity; where pages move or outgrow it, it is captured anew. On a CPU the same step runs as it is.
It does not know sessions, questions or budgets: contexts do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longspan.attention import Mechanism
from longspan.hf.model import CausalModel
from longspan.kernels.append import Place, append
from longspan.kernels.held import Held
from longspan.kernels.superlinear import Turn
from longspan.kv.base import PAGE
from longspan.kv.pages import PagedKV
from longspan.kv.undisturbed import Undisturbed

if TYPE_CHECKING:
    from longspan.hf.native.blocks import Attention

AHEAD = 64
"""Pages beyond the present length that a graph is captured for."""
TOGETHER = 256
"""Steps that may run before the host looks at their tokens."""
_NEVER = 2**31 - 1


class Stepper:
    """The decode steps of one context by one mechanism."""

    def __init__(self, model: CausalModel, layers: Sequence[PagedKV], mechanism: Mechanism) -> None:
        """Take a model with a native forward, a context's pages, and a mechanism that `steps`."""
        assert model.native is not None and mechanism.steps, "serves() was not asked"
        self.model, self.layers, self.mechanism = model, layers, mechanism
        device = model.device
        with torch.inference_mode(False):
            self._ids, self._lengths, self._count = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(3))
            self._said = torch.zeros(TOGETHER, dtype=torch.int64, device=device)
            self._logits = torch.zeros(1, model.native.head.shape[0], dtype=torch.float32, device=device)
            self._make_states(device)
        self._noted: dict[int, Tensor] = {}
        self._scales: dict[int, float] = {}
        self._tables: list[Tensor] = []
        self._synced: list[tuple[int, int]] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._captured_for: tuple[int, ...] = ()
        self._left: Tensor | None = None
        """A tensor of the state that the last step left: whoever brings it back need not have it copied in."""

    def note(self, layers: Sequence[int]) -> None:
        """Note these layers' queries in every step from now on (counted among those that attend)."""
        if set(layers) <= set(self._noted):
            return
        sizes, device = self.model.dimensions, self.model.device
        with torch.inference_mode(False):
            for layer in layers:
                shape = TOGETHER, sizes.query_heads, sizes.head_dim
                self._noted.setdefault(layer, torch.zeros(shape, dtype=self.model.dtype, device=device))
        self._graph = None  # it writes them from now on

    def noted(self, layer: int, count: int) -> tuple[Tensor, float]:
        """Return a layer's queries `[1, Hq, count, D]`, unrotated, of the last `count` steps run, and their scale."""
        return self._noted[layer][:count].transpose(0, 1).unsqueeze(0).clone(), self._scales[layer]

    @staticmethod
    def serves(model: CausalModel, layers: Sequence[PagedKV], mechanism: Mechanism) -> bool:
        """Return whether steps by this mechanism can run so, with these pages."""
        return (
            model.native is not None
            and mechanism.steps
            and not (mechanism.routes and model.trained.routing)  # steps search by the queries themselves
            and all(
                kv.pages.plain
                and not kv.blocks.kept
                and kv.memory is None
                and kv.pool.format is kv.pool.native.format
                and (kv.rotary is None or kv.mirrored)
                for kv in layers
            )
        )

    @torch.inference_mode()
    def run(self, token: int, count: int, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Read a token, then the likeliest next ones.

        Args:
            token: read first.
            count: tokens to read in all, at most `TOGETHER`.
            state: recurrent states before them; empty: before the first token, or there are none.

        Returns:
            The next token after each of those read, int64 `[count]`; float32 logits `[V]` after the last one; the
            states after it. All are the caller's.
        """
        self.begin(token, count, state)
        if self.model.device.type == "cuda":
            graph = self._graph_for()
            for _ in range(count):
                graph.replay()
        else:
            for _ in range(count):
                self._step()
        return self._said[:count].clone(), self._logits[0].clone(), self._take()

    def begin(self, token: int, count: int, state: Mapping[str, Tensor]) -> None:
        """Have pages, states and the first token of some steps where these read them; arguments as for `run`."""
        assert 0 < count <= TOGETHER, f"{count} steps together"
        for kv in self.layers:
            kv.pool.native.need(None)  # a graph reads pages wherever they lie
        before = self.layers[0].length
        with Undisturbed():
            self._make_room(count)
            for kv in self.layers:
                kv.advance(count)
                if kv.rotary is not None:
                    kv.mirror.advance(before + count)
        self._bring(state)
        self._sync()
        self._ids.fill_(token)
        self._lengths.fill_(before)
        self._count.zero_()

    # --- one step, of device tensors alone -------------------------------------------------------------------------

    def _step(self) -> None:
        stack = self.model.native
        assert stack is not None
        self._logits.copy_(stack.step(self._ids, self))
        self._lengths.add_(1)
        chosen = self._logits.argmax(-1)
        self._ids.copy_(chosen)
        self._said.index_copy_(0, self._count, chosen)
        self._count.add_(1)

    def attend(self, block: Attention, rows: Tensor) -> Tensor:
        """See `hf.native.blocks.Steps`."""
        kv = self.layers[block.ordinal]
        table, turn = self._tables[block.ordinal], self._turn(kv)
        rotated = None if kv.rotary is None else kv.mirror.held
        place = Place(kv.pool.keys, kv.pool.values, table, rotated, None if turn is None else turn.per_token)
        q_norm, k_norm = block.q_norm, block.k_norm
        q = append(
            rows, place, self._lengths,
            q_weight=None if q_norm is None else q_norm.weight, k_weight=None if k_norm is None else k_norm.weight,
            eps=0.0 if q_norm is None else q_norm.eps,
        )  # fmt: skip
        if block.ordinal in self._noted:
            self._scales[block.ordinal] = block.scale
            self._noted[block.ordinal].index_copy_(0, self._count, q)
        searched, values = Held(kv.pool.keys, table), Held(kv.pool.values, table)
        keys = searched if rotated is None else Held(rotated)
        out = self.mechanism.step(q, keys, values, self._lengths + 1, scale=block.scale, searched=searched, turn=turn)
        return out.flatten(1)

    def state(self, layer: int) -> tuple[Tensor, Tensor]:
        """See `hf.native.blocks.Steps`."""
        i = self._order[layer]
        return self._inputs[i : i + 1], self._recurrent[i : i + 1]

    def _turn(self, kv: PagedKV) -> Turn | None:
        if kv.rotary is None:
            return None
        trained = kv.rotary.trained_length
        return Turn(kv.rotary.turns(kv.pool.device), _NEVER if trained is None else trained)

    # --- states ----------------------------------------------------------------------------------------------------

    def _make_states(self, device: torch.device) -> None:
        stack = self.model.native
        assert stack is not None
        blocks = stack.recurrent
        self._order = {block.layer: i for i, block in enumerate(blocks)}
        sizes = {
            (block.channels, block.conv.shape[1] - 1, block.heads, block.head_dim, block.state) for block in blocks
        }
        assert len(sizes) <= 1, "recurrent layers of one size"
        for channels, kept, *state in sizes:
            self._inputs = torch.zeros(len(blocks), channels, kept, dtype=self.model.dtype, device=device)
            self._recurrent = torch.zeros(len(blocks), *state, dtype=torch.float32, device=device)

    def _bring(self, state: Mapping[str, Tensor]) -> None:
        """Have the states before a step where it reads them."""
        if not self._order:
            return
        first = state.get(f"{next(iter(self._order))}.recurrent.0")
        if first is not None and first is self._left:
            return
        for layer, i in self._order.items():
            for kind, held in (("conv", self._inputs), ("recurrent", self._recurrent)):
                given = state.get(f"{layer}.{kind}.0")
                if given is None:
                    held[i].zero_()
                else:
                    # Of a convolution's W newest inputs the first is not used.
                    held[i].copy_(given[0, :, 1:] if kind == "conv" else given[0])

    def _take(self) -> dict[str, Tensor]:
        """Return copies of the states after a step: parts of two tensors, which are copied at once."""
        if not self._order:
            return {}
        inputs, recurrent = torch.nn.functional.pad(self._inputs, (1, 0)), self._recurrent.clone()
        out = {}
        for layer, i in self._order.items():
            out[f"{layer}.conv.0"], out[f"{layer}.recurrent.0"] = inputs[i : i + 1], recurrent[i : i + 1]
        self._left = out[f"{next(iter(self._order))}.recurrent.0"]
        return out

    # --- pages -----------------------------------------------------------------------------------------------------

    def _make_room(self, count: int) -> None:
        """Set memory aside for the tokens of many steps, so that pools need not grow (and move) soon."""
        for kv in self.layers:
            wanted = -(-(kv.length + count) // PAGE)
            if wanted - len(kv.table) > len(kv.pool.native.free_slots):
                slack = kv.budget.root.slack(kv.pool.native.page_bytes)
                kv.pool.reserve(kv.pool.native.slots + (AHEAD if slack is None else max(1, min(AHEAD, slack))))
            if kv.rotary is not None:
                kv.keys_at_own_positions(0, kv.length)
                if kv.mirror.held.shape[2] < wanted * PAGE:
                    kv.mirror.reserve((wanted + AHEAD) * PAGE)

    def _sync(self) -> None:
        """Bring page tables up to date on the device."""
        longest = max(len(kv.table) for kv in self.layers)
        if not self._tables or self._tables[0].shape[1] < longest:
            with torch.inference_mode(False):
                self._tables = [
                    torch.zeros(1, longest + AHEAD, dtype=torch.int64, device=self.model.device) for _ in self.layers
                ]
            self._synced = [(-1, 0)] * len(self.layers)
        for i, kv in enumerate(self.layers):
            version, known = self._synced[i]
            start = known if version == kv.pages.version else 0
            if start < len(kv.table):
                self._tables[i][0, start : len(kv.table)].copy_(kv.pages.tensor(self.model.device)[start:])
            self._synced[i] = kv.pages.version, len(kv.table)

    def _graph_for(self) -> torch.cuda.CUDAGraph:
        """Return the graph of a step, captured anew where what it reads lies elsewhere."""
        where = [x.data_ptr() for kv in self.layers for x in (kv.pool.keys, kv.pool.values)]
        where += [kv.mirror.held.data_ptr() for kv in self.layers if kv.rotary is not None]
        where += [table.data_ptr() for table in self._tables]
        if self._graph is None or self._captured_for != tuple(where):
            self._graph = None  # its memory is free before the next one's is taken
            self._graph, self._captured_for = self._capture(), tuple(where)
        return self._graph

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Capture a step; what it changes is put back: the step that ran first compiles and allocates."""
        changed = [self._ids, self._lengths, self._count, *([self._inputs, self._recurrent] if self._order else [])]
        kept = [tensor.clone() for tensor in changed]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step()
        torch.cuda.current_stream().wait_stream(side)
        for tensor, before in zip(changed, kept, strict=True):
            tensor.copy_(before)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph
