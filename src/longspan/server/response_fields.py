"""The body of `/v1/responses`: text in, text out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from longspan.server.chat_fields import Content, ObjectFormat, TextFormat, ToolName
from longspan.server.fields import COMMON_NEUTRAL, COMMON_REFUSALS, Asked, JsonObject, Ratio, SessionId, Strict
from longspan.server.refusals import ApiError, refused

_WHOLE = "the server keeps no responses: send the whole conversation as 'input', or use session_id"
_NO_TOOLS = "tools are called by /v1/chat/completions"


class InputMessage(Strict):
    """A message of the conversation."""

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    id: str | None = Field(None, description="As an earlier response has it; not read.")
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    phase: str | None = None


class ResponseSchema(Strict):
    """A schema that the answer follows."""

    type: Literal["json_schema"]
    name: ToolName
    description: str | None = None
    schema_: JsonObject = Field(alias="schema")
    strict: bool | None = None


class ResponseText(Strict):
    """In which form the answer must come."""

    format: Annotated[TextFormat | ObjectFormat | ResponseSchema, Field(discriminator="type")] | None = None
    verbosity: Annotated[None, BeforeValidator(lambda value: _none("text.verbosity", value))] = None


def _none(field: str, value: Any) -> None:
    if value is not None:
        raise refused(field, "the model has no such setting: leave it out")


class ResponsesRequest(Asked):
    """A conversation to go on with, in the form of OpenAI's newer API."""

    refusals: ClassVar[Mapping[str, str]] = COMMON_REFUSALS | {
        "access_programs": "there are none: leave it out",
        "background": "answers come while the client waits: leave it out, or stream",
        "background_options": "answers come while the client waits: leave it out",
        "context_management": "nothing is compacted: leave it out",
        "conversation": _WHOLE,
        "image": "the model writes text: leave it out",
        "include": "there is nothing more to include: leave it out",
        "max_tool_calls": _NO_TOOLS,
        "parallel_tool_calls": _NO_TOOLS,
        "previous_response_id": _WHOLE,
        "prompt": "there are no prompt templates: send the text as 'input'",
        "reasoning": "the model has no such setting: leave it out",
        "tool_choice": _NO_TOOLS,
        "tools": _NO_TOOLS,
        "top_logprobs": "/v1/chat/completions tells them",
        "truncation": "a conversation that is too long is refused, not cut: leave it out, or send 'disabled'",
    }
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = COMMON_NEUTRAL | {
        "background": (False,),
        "include": ([],),
        "parallel_tool_calls": (True, False),
        "tool_choice": ("auto", "none"),
        "tools": ([],),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
    }

    model: str = Field(description="As /v1/models names it.")
    input: Annotated[str, Field(min_length=1)] | Annotated[list[InputMessage], Field(min_length=1, max_length=100_000)]
    instructions: str | None = Field(None, description="Stands before the conversation as the system's message.")
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Ratio | None = None
    text: ResponseText | None = None
    stream: bool | None = None
    stream_options: Any = Field(None, description="Only null.", json_schema_extra={"type": "null"})
    user: Annotated[str, Field(max_length=512)] | None = Field(None, description="Told in the server's log.")
    safety_identifier: Annotated[str, Field(max_length=512)] | None = Field(None, description="As 'user'.")
    session_id: SessionId | None = Field(None, description="Not in OpenAI's API: a session whose documents are asked.")

    def check(self) -> None:
        """Refuse what is not done, and fields that do not go together."""
        if self.stream_options not in (None, {}, {"include_obfuscation": False}):
            raise refused("stream_options", "nothing is padded, and the last event tells the usage: leave it out")
        if self.session_id is not None:
            if self.text is not None and self.text.format is not None and self.text.format.type != "text":
                raise refused("text.format", "a session answers in plain text: ask it without")
            if not isinstance(self.input, str) and not any(each.role == "user" for each in self.input):
                raise ApiError(400, "'input' asks the session nothing: add a message of the user", param="input")

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation as the chat endpoint has it."""
        before = [{"role": "system", "content": self.instructions}] if self.instructions else []
        if isinstance(self.input, str):
            return [*before, {"role": "user", "content": self.input}]
        return before + [{"role": each.role, "content": each.content} for each in self.input]
