"""What the bodies of several endpoints share: how an answer is drawn, and how fields that are not honoured are refused.

A field of OpenAI's API is either here under its name, or in a table of refusals with what to do instead; a field that
nobody knows is refused as well. It does not know models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from longspan.engine.sampler import SamplingParams
from longspan.server.refusals import ApiError, refused

MOST_STOPS = 16
_CACHED_ANYWAY = "leave it out: whatever begins as an earlier request or session did is reused without a key"
_NO_STORE = "answers are not kept on the server: leave it out, and keep what you need, or use session_id"
COMMON_REFUSALS: dict[str, str] = {
    "metadata": _NO_STORE,
    "moderation": "answers are not moderated: leave it out",
    "prompt_cache_key": _CACHED_ANYWAY,
    "prompt_cache_options": _CACHED_ANYWAY,
    "prompt_cache_retention": "leave it out: sessions (session_id) are what stays",
    "service_tier": "there is one tier: leave it out, or send 'auto' or 'default'",
    "store": "answers are not kept on the server: send false, or leave it out",
}
COMMON_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "metadata": ({},),
    "service_tier": ("auto", "default"),
    "store": (False,),
}

Stops = Annotated[
    str | Annotated[list[Annotated[str, Field(min_length=1, max_length=1000)]], Field(max_length=MOST_STOPS)],
    Field(description="Strings that end the answer; the text stops before the first of them, whatever the tokens."),
]
SessionId = Annotated[
    str,
    Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}$", description="Name of a session, whose documents are asked."),
]
Ratio = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]


class Strict(BaseModel):
    """A part of a body, in which every field is known."""

    # Only texts that are checked for something are checked to be text: half of a surrogate pair is none.
    model_config = ConfigDict(extra="forbid", str_max_length=2**40)


class Asked(Strict):
    """A body: a field of `refusals` is refused by name unless it is null or says what is done anyway (`neutral`)."""

    refusals: ClassVar[Mapping[str, str]] = COMMON_REFUSALS
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = COMMON_NEUTRAL

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        kept = {}
        for name, value in given.items():
            if name not in cls.refusals:
                kept[name] = value
            elif value is not None and not any(value == each and type(value) is type(each) for each in cls._fine(name)):
                raise refused(name, cls.refusals[name])
        return kept

    @classmethod
    def _fine(cls, name: str) -> tuple[Any, ...]:
        return tuple(cls.neutral.get(name, ()))


class StreamOptions(Strict):
    """How an answer is streamed."""

    include_usage: bool = Field(False, description="A last chunk, without choices, tells the usage.")
    include_obfuscation: bool = Field(False, description="Only false: nothing is padded.")

    def check(self) -> None:
        """Refuse what is not done."""
        if self.include_obfuscation:
            raise refused("stream_options.include_obfuscation", "nothing is padded: send false, or leave it out")


class Drawn(Asked):
    """How an answer is drawn: OpenAI's fields, and three that it lacks."""

    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = Field(
        None, description="0 takes the likeliest token. Default: 1, as OpenAI's."
    )
    top_p: Ratio | None = Field(None, description="Draw from the likeliest tokens with this mass; 0 is greedy.")
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = Field(
        None, description="The same seed gives the same answer."
    )
    stop: Stops | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]] | None = Field(
        None, description="Added to tokens' logits, by token id.", max_length=1024
    )
    n: Annotated[int, Field(ge=1, le=128)] | None = Field(None, description="Answers; the prompt is read once.")
    user: Annotated[str, Field(max_length=512)] | None = Field(None, description="Told in the server's log.")
    safety_identifier: Annotated[str, Field(max_length=512)] | None = Field(None, description="As 'user'.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31)] | None = Field(
        None, description="Not in OpenAI's API: draw from the k likeliest tokens; 0 is off."
    )
    min_p: Ratio | None = Field(
        None, description="Not in OpenAI's API: leave out tokens less likely than this times the likeliest."
    )
    repetition_penalty: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | None = Field(
        None, description="Not in OpenAI's API: 1 is off."
    )

    def params(self, max_tokens: int) -> SamplingParams:
        """Return how the engine is to draw."""
        temperature, top_p = self.temperature, self.top_p
        if top_p == 0:  # the smallest set that reaches no mass: the likeliest token alone
            temperature, top_p = 0.0, 1.0
        given: dict[str, Any] = {
            "temperature": 1.0 if temperature is None else temperature,
            "top_p": top_p,
            # OpenAI takes negative seeds; the engine's are of 63 bits.
            "seed": None if self.seed is None else self.seed % 2**63,
            "stop": (self.stop,) if isinstance(self.stop, str) and self.stop else self.stop or None,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": self._bias(),
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
        }
        return SamplingParams(max_tokens, **{name: value for name, value in given.items() if value is not None})

    def _bias(self) -> tuple[tuple[int, float], ...] | None:
        if not self.logit_bias:
            return None
        found: dict[int, float] = {}
        for token, bias in self.logit_bias.items():
            # isdecimal alone would take other scripts' digits.
            if not (token.isascii() and token.isdecimal() and len(token) < 10):
                raise ApiError(400, f"'logit_bias' names {token!r}: give token ids", param="logit_bias")
            found[int(token)] = bias
        return tuple(sorted(found.items()))

    def check_stream(self) -> None:
        """Refuse options of a stream where there is none."""
        if self.stream_options is not None:
            if not self.stream:
                raise ApiError(
                    400, "'stream_options' is for streams: send \"stream\": true as well", param="stream_options"
                )
            self.stream_options.check()

    @property
    def usage_wanted(self) -> bool:
        """Whether a stream's last chunk tells the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


JsonObject = dict[str, JsonValue]
