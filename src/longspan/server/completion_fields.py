"""The body of `/v1/completions`: text or tokens to go on from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field

from longspan.server.fields import COMMON_NEUTRAL, COMMON_REFUSALS, Drawn
from longspan.server.refusals import ApiError

MOST_PROMPTS = 256
Token = Annotated[int, Field(ge=0, lt=2**31)]
Prompt = (
    Annotated[str, Field(min_length=1)]
    | Annotated[list[Token], Field(min_length=1)]
    | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MOST_PROMPTS)]
    | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=MOST_PROMPTS)]
)


class CompletionRequest(Drawn):
    """A text to go on with."""

    refusals: ClassVar[Mapping[str, str]] = COMMON_REFUSALS | {
        "best_of": "answers are not drawn to be thrown away: send n, and choose",
        "suffix": "the model writes forwards: leave it out",
    }
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = COMMON_NEUTRAL | {"best_of": (1,), "suffix": ("",)}

    model: str = Field(description="As /v1/models names it.")
    prompt: Prompt = Field(description="A text, several, or the same as token ids.")
    max_tokens: Annotated[int, Field(ge=0)] | None = Field(None, description="0 with echo: nothing is written.")
    echo: bool | None = Field(None, description="The prompt stands before the answer, with its logprobs.")
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(None, description="Of so many of the likeliest tokens.")

    def check(self) -> None:
        """Refuse fields that do not go together."""
        self.check_stream()
        if self.max_tokens == 0 and not self.echo:
            raise ApiError(400, "'max_tokens' is 0: without 'echo' nothing is left to answer", param="max_tokens")

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one a request."""
        given: Any = self.prompt
        if isinstance(given, str) or isinstance(given[0], int):
            return [given]
        return list(given)
