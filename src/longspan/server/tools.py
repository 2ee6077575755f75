"""Tools: how they are told to a model, what an answer that calls them looks like, and how calls are read from it.

One form serves every model: `<tool_call>`, a JSON object of name and arguments, `</tool_call>`, as often as it calls.
Models that learnt it (Hermes, Qwen) are told of tools by their own chat template; others by a message of the system.
The grammar sees to it that names and arguments are right. It does not know HTTP.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longspan.server.chat_fields import NamedTool, Tool
from longspan.server.constraint import Grammar, Vocabulary, compact

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_TOLD = (
    "You can call functions. Here are their signatures:\n<tools>\n{tools}\n</tools>\n"
    'To call one, answer with\n<tool_call>\n{{"name": NAME, "arguments": OBJECT}}\n</tool_call>\n'
    "and with several such blocks to call several."
)
_ANY = {"type": "object"}
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Call:
    """A call that an answer makes; `arguments` is JSON."""

    name: str
    arguments: str


def described(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Return tools as chat templates take them."""
    return [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in tools]


def told(messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Return a conversation for a template that knows no tools: they, calls and results become text."""
    made: list[dict[str, Any]] = []
    for message in messages:
        content, role = message.get("content") or "", message["role"]
        if role == "tool":
            role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
        for call in message.get("tool_calls") or ():
            body = json.dumps(
                {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}, ensure_ascii=False
            )
            content += f"{chr(10) if content else ''}{OPEN}\n{body}\n{CLOSE}"
        if made and role == "user" == made[-1]["role"]:  # several results: templates want turns
            made[-1]["content"] += f"\n{content}"
        else:
            made.append({"role": role, "content": content})
    if tools:
        about = _TOLD.format(tools="\n".join(json.dumps(each, ensure_ascii=False) for each in described(tools)))
        if made and made[0]["role"] == "system":
            made[0]["content"] += f"\n\n{about}"
        else:
            made.insert(0, {"role": "system", "content": about})
    return made


def grammar(vocabulary: Vocabulary, tools: Sequence[Tool], choice: str | NamedTool, parallel: bool) -> Grammar:
    """Return what an answer may say: text and calls (`auto`), or calls alone, of one tool where it is named."""
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
    rules = []
    for number, tool in enumerate(tools):
        schema = {
            "type": "object",
            "properties": {"name": {"const": tool.function.name}, "arguments": tool.function.parameters or _ANY},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        rules.append(f"tool_{number}: %json {compact(_hoisted(schema))}")
    named = " | ".join(f"tool_{number}" for number in range(len(tools)))
    body = rf'body: "\n" ({named}) "\n{CLOSE}"'
    if choice == "auto":
        # The trigger is lazy: as soon as it is written, a call has begun.
        start = "start: (begun body)* TEXT" if parallel else "start: TEXT | begun body"
        rules += [start, f'begun[lazy]: TEXT "{OPEN}"', "TEXT: /(.|\\n)*/"]
    else:
        more = f'("\\n{OPEN}" body)*' if parallel and not isinstance(choice, NamedTool) else ""
        rules.append(f'start: "{OPEN}" body {more}')
    return Grammar(vocabulary, "%llguidance {}\n" + "\n".join([*rules, body]) + "\n", "tools")


def _hoisted(schema: dict[str, Any]) -> dict[str, Any]:
    """Move definitions of the arguments' schema to where references look for them: at the root."""
    arguments = schema["properties"]["arguments"]
    kept = {key: value for key, value in arguments.items() if key not in ("$defs", "definitions", "$schema", "$id")}
    found = {key: arguments[key] for key in ("$defs", "definitions") if key in arguments}
    return {**schema, "properties": {**schema["properties"], "arguments": kept}, **found}


class Reader:
    """Takes an answer's text as it comes, and tells apart what is text and what are calls."""

    def __init__(self) -> None:
        """Begin with text."""
        self.calls: list[Call] = []
        self._held = ""
        self._inside = False

    def push(self, piece: str) -> tuple[str, list[Call]]:
        """Take the next piece; return text that can be shown, and calls that are complete."""
        self._held += piece
        shown, calls = "", []
        while True:
            if self._inside:
                found = self._call()
                if found is None:
                    break
                calls.append(found)
                self._inside = False
                continue
            at = self._held.find(OPEN)
            if at >= 0:
                shown += self._held[:at].rstrip()
                self._held, self._inside = self._held[at + len(OPEN) :], True
                continue
            keep = _waiting(self._held, after_call=bool(self.calls or calls))
            shown += self._held[: len(self._held) - keep]
            self._held = self._held[len(self._held) - keep :]
            break
        self.calls += calls
        return shown, calls

    def finish(self) -> str:
        """Return what was held back: a call that was cut is shown as text, so that nothing is lost."""
        rest, self._held = self._held, ""
        if self._inside:
            return OPEN + rest
        return "" if self.calls and not rest.strip() else rest

    def _call(self) -> Call | None:
        text = self._held.lstrip()
        if "}" not in text:
            return None
        try:
            value, end = _DECODER.raw_decode(text)
        except ValueError:
            return None
        after = re.match(rf"\s*{re.escape(CLOSE)}\s*", text[end:])
        if after is None or not isinstance(value, dict):
            return None
        self._held = text[end + after.end() :]
        return Call(str(value.get("name", "")), json.dumps(value.get("arguments", {}), ensure_ascii=False))


def _waiting(text: str, *, after_call: bool) -> int:
    """Return how many of the last characters may yet turn out to belong to a call (blanks before one are dropped)."""
    start = next((n for n in range(min(len(OPEN) - 1, len(text)), 0, -1) if text.endswith(OPEN[:n])), 0)
    head = text[: len(text) - start]
    return start + len(head) - len(head.rstrip()) if not (after_call and not head.strip()) else len(text)
