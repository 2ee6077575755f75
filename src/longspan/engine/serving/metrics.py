"""What a scheduler counts, as numbers for whoever shows them; it does not know how they are shown."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

from longspan.engine.resident import Moves

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Upper bounds of the histograms' buckets."""
REASONS = ("stop", "length", "read", "cancelled", "error")
"""How a choice may end."""


@dataclass
class Histogram:
    """Observations of seconds: how many up to each bound, beyond the last one, and their sum."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(SECONDS) + 1))
    total: float = 0.0

    def observe(self, seconds: float, times: int = 1) -> None:
        """Count an observation, or several alike."""
        self.counts[bisect.bisect_left(SECONDS, seconds)] += times
        self.total += seconds * times

    def copy(self) -> Histogram:
        """Return it as it is now."""
        return Histogram(list(self.counts), self.total)

    @property
    def count(self) -> int:
        """Number of observations."""
        return sum(self.counts)


@dataclass
class Metrics:
    """A scheduler's counters; those that are not histograms only grow, unless their name says what is there now."""

    waiting_now: int = 0
    """Requests in the queue."""
    reading_now: int = 0
    writing_now: int = 0
    """Answers that are being written."""
    sessions_now: int = 0
    """Sessions in memory."""
    session_bytes_now: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("device", "host"), 0))
    """Bytes that sessions in memory take, by tier."""
    session_moves: dict[str, int] = field(default_factory=lambda: Moves().as_json())
    """How often sessions went from one tier to another, and how often one could not be saved and stayed."""
    cached_now: int = 0
    """Contexts kept for requests that begin alike."""
    finished: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    """Choices by how they ended; all reasons from the beginning, since whoever copies counters may not see it grow."""
    refused: int = 0
    """Requests that found the queue full."""
    prompt_tokens: int = 0
    """Of documents and prompts, those cached among them."""
    cached_tokens: int = 0
    read_tokens: int = 0
    """Tokens run through the model before answers."""
    written_tokens: int = 0
    prefix_hits: int = 0
    """Requests that began where another one or a saved session stood."""
    steps: int = 0
    """Batched steps of decode."""
    first_token: Histogram = field(default_factory=Histogram)
    """Seconds from `submit` to an answer's first token."""
    between_tokens: Histogram = field(default_factory=Histogram)
    queued: Histogram = field(default_factory=Histogram)
    """Seconds that requests waited before anything of theirs was read."""
    pages_now: dict[tuple[str, str], int] = field(default_factory=dict)
    """Pages held, by tier (`device`, `host`, `disk`) and format."""
    kv_bytes_now: int = 0
    """Bytes that contexts refer to; those that share pages count them each."""
