"""From a conversation to the text that a model goes on from, by its own chat template.

A template may refuse a conversation (roles that do not alternate, say): the client is told what it says. It does not
know how tokens are made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from longspan.errors import UsageError
from longspan.hf.model import CausalModel
from longspan.server import tools as calling
from longspan.server.chat_fields import Message, Tool
from longspan.server.refusals import ApiError


def rendered(model: CausalModel, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str:
    """Return the prompt of a conversation (ApiError: the template refuses it)."""
    plain = [_plain(message) for message in messages]
    template = str(model.tokenizer.chat_template or "")
    knows = calling.OPEN in template
    if not knows:
        plain = calling.told(plain, tools)
    return _by_template(model, plain, calling.described(tools) if knows else [])


def of_texts(model: CausalModel, messages: Sequence[Mapping[str, str]]) -> str:
    """Return the prompt of a conversation of roles and texts (ApiError: the template refuses it)."""
    return _by_template(model, [{"role": _role(each["role"]), "content": each["content"]} for each in messages], [])


def _by_template(model: CausalModel, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str:
    try:
        text = model.chat(messages, tools)
    except UsageError as error:
        raise ApiError(400, str(error), param="messages", code="invalid_messages") from error
    try:
        text.encode()
    except UnicodeEncodeError as error:  # a call's arguments are JSON of their own, which may escape anything
        raise ApiError(400, "'messages' hold half of a surrogate pair: send whole characters", param="messages",
                       code="invalid_messages") from error  # fmt: skip
    if not text:
        raise ApiError(400, "'messages' hold no text: say something", param="messages", code="invalid_messages")
    return text


def _plain(message: Message) -> dict[str, Any]:
    """Return a message as templates read it: calls' arguments as objects, OpenAI's newer role under its old name."""
    made: dict[str, Any] = {"role": _role(message.role), "content": message.content or ""}
    if message.role == "assistant" and message.tool_calls:
        made["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _object(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    if message.role == "tool":
        made["tool_call_id"] = message.tool_call_id
    return made


def _role(role: str) -> str:
    return "system" if role == "developer" else role


def _object(arguments: str) -> Any:
    """Return arguments as an object where they are JSON; a model may have been cut short, and its text stays then."""
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
