"""What adapters learn from: stretches of a text, some with facts hidden in them and questions about these at their end.

Every example follows from a number. A stretch begins anywhere in the text; where it is to be asked about, sentences
`The code of the brass heron is 48291.` stand in it at random places, and behind it questions and answers in the model's
own chat form, as the engine puts them. Conversations without a document, among the texts, keep an adapted model as
polite as it was; a few come with the package. It does not know how a loss is made of it, or which model reads it, but
for its tokens.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from longspan.engine import prompts
from longspan.errors import UsageError
from longspan.hf.model import CausalModel
from longspan.sessions.session import Turn

_ADJECTIVES = (
    "amber blunt brass calm crimson dusty eager faint gilded hollow ivory jagged keen lunar mellow narrow".split()
)
_NOUNS = (
    "anchor badger candle dragon ember falcon garnet heron island jigsaw kettle lantern meadow needle otter".split()
)


Chat = list[dict[str, str]]
"""Messages as OpenAI's interface has them, user and assistant in turn."""
OWN = "own"
_TALKED, _TALK = 0.15, 512
"""Share of texts that are conversations, where there are any; tokens after which no other one is added to a text."""


@dataclass(frozen=True)
class Example:
    """Tokens and what of them counts."""

    tokens: Tensor
    """int64 `[T]`."""
    weights: Tensor
    """float32 `[T]`: how much predicting each token counts."""
    rows: Tensor
    """int64 `[R]`, the positions whose attention is looked at, ascending."""


class Source(Protocol):
    """Where examples come from."""

    tokens: Tensor
    """int32, what they are drawn from: a training that goes on must find the same."""

    def draw(self, seed: int, length: int, *, rows: int = 64, asked: float = 0.5) -> Example:
        """See `Texts.draw`."""
        ...


class Texts:
    """A text in a model's tokens, to draw examples from."""

    def __init__(self, model: CausalModel, text: str, chats: Sequence[Chat] = ()) -> None:
        """Take a text, and conversations to mix in (UsageError: the text is too short to learn from)."""
        self.model, self.chats = model, chats
        self.tokens = torch.tensor(model.tokens(text), dtype=torch.int32)
        if self.tokens.numel() < 256:
            raise UsageError(f"the text has {self.tokens.numel()} tokens: give more with --data")
        self.head = prompts.before_documents(model)

    def draw(self, seed: int, length: int, *, rows: int = 64, asked: float = 0.5) -> Example:
        """Return an example.

        Args:
            seed: which.
            length: tokens, at most; as many as the text has, where that is less.
            rows: how many positions are looked at.
            asked: the share of examples that end in questions.
        """
        rng = random.Random(seed)
        if self.chats and rng.random() < _TALKED:
            return self._talk(rng, length, rows)
        if rng.random() < asked and length >= 384:
            return self._asked(rng, length, rows)
        tokens = self._stretch(rng, length)
        count = tokens.numel()
        weights = torch.ones(count)
        weights[0] = 0.0
        return Example(tokens, weights, _some(rng, count, rows))

    def _stretch(self, rng: random.Random, count: int) -> Tensor:
        start = rng.randrange(max(1, self.tokens.numel() - count))
        found: Tensor = self.tokens[start : start + count].long()
        return found

    def _asked(self, rng: random.Random, length: int, rows: int) -> Example:
        """Return facts in a stretch and questions behind it, the answers counted ten times as much as the text."""
        names = rng.sample([f"{a} {n}" for a in _ADJECTIVES for n in _NOUNS], rng.choice((1, 2, 4, 8)))
        facts = [(name, str(rng.randrange(10000, 100000))) for name in names]
        turns: list[Turn] = []
        tail: list[tuple[list[int], float]] = []
        before = ""
        for name, code in rng.sample(facts, min(len(facts), 4)):
            asked = f"What is the code of the {name}?"
            whole = prompts.after_documents(self.model, asked, turns)
            tail.append((whole[len(_tokens(tail)) :] if before else whole, 0.0))
            told = self.model.tokens(code)
            tail.append(([*told, *self._ends()], 10.0))
            turns.append(Turn(asked, code))
            before = code
        needles = [self.model.tokens(f" The code of the {name} is {code}. ") for name, code in facts]
        room = length - len(self.head) - len(_tokens(tail)) - sum(map(len, needles))
        text = self._stretch(rng, max(0, room)).tolist()
        pieces: list[int] = []
        cuts = sorted(rng.randint(0, len(text)) for _ in needles)
        for needle, start, stop in zip(needles, [0, *cuts], cuts, strict=False):
            pieces += text[start:stop] + needle
        pieces += text[cuts[-1] :]
        parts = [(self.head, 0.0), (pieces, 1.0), *tail]
        weights = torch.cat([torch.full((len(part),), weight) for part, weight in parts])
        tokens = torch.tensor(_tokens(parts))[:length]
        # The rows that matter are those that answer; the others are drawn.
        answering = (weights[: tokens.numel()] == 10.0).nonzero().flatten() - 1
        others = _some(rng, tokens.numel(), max(1, rows - answering.numel()))
        return Example(tokens, weights[: tokens.numel()], torch.cat([answering[:rows], others]).unique())

    def _talk(self, rng: random.Random, length: int, rows: int) -> Example:
        """Return some conversations in the model's own form, one behind the other; what the assistant says counts."""
        parts: list[tuple[list[int], float]] = []
        while len(_tokens(parts)) < min(_TALK, length):
            chat = rng.choice(self.chats)
            said = rng.randrange(1, len(chat), 2)
            parts.append((self.model.tokens(self.model.chat(chat[:said])), 0.0))
            parts.append(([*self.model.tokens(chat[said]["content"]), *self._ends()], 1.0))
        weights = torch.cat([torch.full((len(part),), weight) for part, weight in parts])[:length]
        tokens = torch.tensor(_tokens(parts))[:length]
        return Example(tokens, weights, _some(rng, tokens.numel(), rows))

    def _ends(self) -> list[int]:
        """Return the token that ends an answer, the tokenizer's own."""
        end = self.model.tokenizer.eos_token_id
        return [] if end is None else [int(end)]


def conversations(file: str) -> list[Chat]:
    """Return the conversations of a file of lines `{"messages": [...]}`; of the package's own, where it is `own`.

    Raises:
        UsageError: it can't be read, or a line is no conversation of a user and an assistant.
    """
    own = resources.files("longspan.train").joinpath("conversations.jsonl")
    try:
        lines = (own if file == OWN else Path(file).expanduser()).read_text(encoding="utf-8").splitlines()
        found: list[Chat] = [json.loads(line)["messages"] for line in lines if line.strip()]
        for chat in found:
            roles = [message["role"] for message in chat]
            if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
                raise ValueError("messages of user and assistant in turn are wanted")
            if not all(isinstance(message["content"], str) for message in chat):
                raise ValueError("contents are texts")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f'--chat {file} can\'t be used ({error}): give lines {{"messages": [...]}}, user and assistant in turn, '
            f"or {OWN}"
        ) from error
    if not found:
        raise UsageError(f"--chat {file} holds no conversation: give another file, or {OWN}")
    return found


def _tokens(parts: list[tuple[list[int], float]]) -> list[int]:
    return [token for part, _ in parts for token in part]


def _some(rng: random.Random, count: int, rows: int) -> Tensor:
    """Return up to `rows` positions, more of them late, where there is more to search."""
    found: Tensor = torch.tensor([min(count - 1, int(count * rng.random() ** 0.5)) for _ in range(rows)])
    return found.unique()  # type: ignore[no-any-return]
