"""The body of `/v1/chat/completions`: messages, tools, and in which form the answer must come."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from longspan.server.fields import COMMON_NEUTRAL, COMMON_REFUSALS, Drawn, JsonObject, SessionId, Strict
from longspan.server.refusals import ApiError, refused

MOST_TOOLS = 128
ToolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
_TEXT_ONLY = "only parts of type 'text' are read: leave pictures, sound and files out, or give a document's text"


def _parts(value: Any) -> Any:
    """Return content as one text: its parts joined, where it comes in parts."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") not in ("text", "input_text", "output_text"):
            raise ApiError(400, _TEXT_ONLY, param="messages", code="unsupported_content")
        if not isinstance(part.get("text"), str):
            raise ApiError(400, "a part of type 'text' needs a 'text'", param="messages", code="invalid_value")
        texts.append(part["text"])
    return "".join(texts)


Content = Annotated[str, BeforeValidator(_parts)]


class FunctionCall(Strict):
    """What a call of a tool says."""

    name: ToolName
    arguments: str = Field(description="JSON.")


class ToolCall(Strict):
    """A call that an earlier answer made."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class SystemMessage(Strict):
    """What the model is told beforehand."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Strict):
    """What somebody said."""

    role: Literal["user"]
    content: Content
    name: str | None = None


class AssistantMessage(Strict):
    """What the model said."""

    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[JsonObject] | None = Field(None, description="As an answer has them; not read.")
    tool_calls: list[ToolCall] | None = None


class ToolMessage(Strict):
    """What a tool answered."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str


Message = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage,
    Field(discriminator="role"),
]


class FunctionDefinition(Strict):
    """A function that the model may call."""

    name: ToolName
    description: str | None = None
    parameters: JsonObject | None = Field(None, description="JSON schema of its arguments; none: an empty object.")
    strict: bool | None = Field(None, description="Arguments follow the schema in any case.")


class Tool(Strict):
    """A tool: a function."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Strict):
    """The name of a function."""

    name: ToolName


class NamedTool(Strict):
    """The one tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Strict):
    """A schema that the answer follows."""

    name: ToolName
    description: str | None = None
    schema_: JsonObject | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="The answer follows the schema in any case.")


class TextFormat(Strict):
    """An answer of any form."""

    type: Literal["text"]


class ObjectFormat(Strict):
    """An answer that is one JSON object."""

    type: Literal["json_object"]


class SchemaFormat(Strict):
    """An answer that is JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


Format = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]


class ChatRequest(Drawn):
    """A conversation to go on with."""

    refusals: ClassVar[Mapping[str, str]] = COMMON_REFUSALS | {
        "audio": "the model writes text: leave it out",
        "function_call": "it is OpenAI's old name: use 'tool_choice'",
        "functions": "it is OpenAI's old name: use 'tools'",
        "modalities": "the model writes text: leave it out, or send ['text']",
        "prediction": "nothing is drafted from a prediction: leave it out",
        "reasoning_effort": "the model has no such setting: leave it out",
        "verbosity": "the model has no such setting: leave it out, and say in the prompt how long an answer may be",
        "web_search_options": "nothing is fetched from the web: leave it out, and give documents to a session",
    }
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = COMMON_NEUTRAL | {
        "modalities": (["text"],),
    }

    model: str = Field(description="As /v1/models names it.")
    messages: Annotated[list[Message], Field(min_length=1, max_length=100_000)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(None, description="The old name of max_completion_tokens.")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: Format | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = Field(None, description="false: one call at most. Default: true.")
    session_id: SessionId | None = Field(
        None, description="Not in OpenAI's API: a session whose documents are asked; the messages stand behind them."
    )
    citations: bool | None = Field(
        None, description="Not in OpenAI's API: the answer names the passages that it rests on ('citations')."
    )

    def check(self) -> None:
        """Refuse fields that do not go together."""
        self.check_stream()
        both = self.max_tokens is not None and self.max_completion_tokens is not None
        if both and self.max_tokens != self.max_completion_tokens:
            raise ApiError(
                400, "'max_tokens' and 'max_completion_tokens' differ: they are one thing, so send one",
                param="max_tokens",
            )  # fmt: skip
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "'top_logprobs' needs \"logprobs\": true", param="top_logprobs")
        names = [tool.function.name for tool in self.tools or ()]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ApiError(400, f"'tools' has {sorted(twice)[0]!r} twice: give each its own name", param="tools")
        self._check_choice(names)
        if self.citations and self.session_id is None:
            raise ApiError(400, "'citations' are of a session's documents: give session_id", param="citations")
        if self.session_id is not None and (self.tools or self._shaped):
            raise refused(
                "session_id" if self.tools else "response_format",
                "a session answers in plain text: ask it without tools and response_format",
            )
        if not any(message.role in ("user", "tool") for message in self.messages) and self.session_id is not None:
            raise ApiError(400, "'messages' ask the session nothing: add one of the user", param="messages")

    def _check_choice(self, names: list[str]) -> None:
        choice = self.tool_choice
        if not self.tools:
            for field in ("tool_choice", "parallel_tool_calls"):
                if getattr(self, field) is not None and not (field == "tool_choice" and choice == "none"):
                    raise ApiError(400, f"'{field}' is about 'tools': give some, or leave it out", param=field)
        elif isinstance(choice, NamedTool) and choice.function.name not in names:
            raise ApiError(400, f"'tool_choice' names {choice.function.name!r}, which is not in 'tools'",
                           param="tool_choice")  # fmt: skip
        if self.tools and self._shaped and choice != "none":
            raise ApiError(
                400, "'response_format' and 'tools' can't both shape an answer: leave one out, or the tools' choice "
                "at 'none'", param="response_format",
            )  # fmt: skip

    @property
    def _shaped(self) -> bool:
        return self.response_format is not None and self.response_format.type != "text"

    @property
    def token_limit(self) -> int | None:
        """Tokens of the answer at most, where the client says so."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
