"""`/v1/chat/completions`: a conversation goes on, with tools, a form, or a session's documents."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from fastapi.responses import Response
from sse_starlette import ServerSentEvent

from longspan.engine.serving import Delta, Done, Event, Progress, Request, Usage
from longspan.server import answering, constraint, prompting, tools, wording
from longspan.server.chat_fields import ChatRequest
from longspan.server.refusals import ApiError
from longspan.server.serving import Serving, key_of, note_user, serving_of

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/chat/completions", summary="Go on with a conversation")
async def chat(body: ChatRequest, http: HttpRequest, serving: Annotated[Serving, Depends(serving_of)]) -> Response:
    """Answer a conversation, at once or as a stream of server-sent events."""
    serving.check_model(body.model)
    body.check()
    note_user(http, body.user or body.safety_identifier)
    session = None if body.session_id is None else serving.session(http, body.session_id)
    # Templates and grammars may take a while: not on the loop that answers /health.
    asked = await anyio.to_thread.run_sync(request_of, body, serving, key_of(http), session)
    handle = serving.submit(asked)
    answer = _Answer(body, serving, asked.n)
    if body.stream:
        return await answering.stream(http, [handle], answer.chunks, serving.options.send_seconds)
    await answering.all_events(http, [handle], lambda _, event: answer.take(event))
    return answering.whole(answer.completion())


def request_of(body: ChatRequest, serving: Serving, key: str, session: str | None = None) -> Request:
    """Return what the engine is asked (ApiError: a template or a grammar refuses it).

    Args:
        body: what the client asks.
        serving: the server's parts.
        key: whose request it is.
        session: under which name the session is saved that is asked.
    """
    most = serving.answer_tokens(body.token_limit)
    common: dict[str, Any] = {
        "params": body.params(most),
        "key": key,
        "n": body.n or 1,
        "logprobs": (body.top_logprobs or 0) if body.logprobs else None,
        "citations": bool(body.citations),
    }
    if session is not None:
        messages = [{"role": message.role, "content": message.content or ""} for message in body.messages]
        return Request(messages=messages, session=session, makes_session=False, **common)
    called = body.tools if body.tools and body.tool_choice != "none" else []
    text = prompting.rendered(serving.model, body.messages, called)
    return Request(text=text, constraint=_constraint(body, serving), **common)


def _constraint(body: ChatRequest, serving: Serving) -> constraint.Grammar | None:
    choice = body.tool_choice or "auto"
    if body.tools and choice != "none":
        parallel = body.parallel_tool_calls is not False
        return tools.grammar(serving.vocabulary, body.tools, choice, parallel)
    form = body.response_format
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return constraint.of_schema(serving.vocabulary, {"type": "object"}, "response_format")
    schema = form.json_schema.schema_
    if schema is None:
        raise ApiError(400, "'response_format.json_schema.schema' is missing", param="response_format")
    return constraint.of_schema(serving.vocabulary, schema, "response_format")


class _Choice:
    """One choice as it grows."""

    def __init__(self, reads_tools: bool) -> None:
        self.text, self.calls = "", list[tools.Call]()
        self.logprobs: list[dict[str, Any]] = []
        self.done: Done | None = None
        self.reader = tools.Reader() if reads_tools else None

    def push(self, piece: str) -> tuple[str, list[tools.Call]]:
        """Take text; return what of it is shown, and calls."""
        shown, calls = (piece, list[tools.Call]()) if self.reader is None else self.reader.push(piece)
        self.text += shown
        self.calls += calls
        return shown, calls

    def end(self, done: Done) -> str:
        """Take the end; return what is shown of what was held back."""
        self.done = done
        rest = "" if self.reader is None else self.reader.finish()
        self.text += rest
        return rest

    @property
    def reason(self) -> str:
        """Why it ended, in OpenAI's words."""
        assert self.done is not None, "it has not ended"
        if self.calls and self.done.finish_reason == "stop":
            return "tool_calls"
        return self.done.finish_reason


class _Answer:
    """An answer under way: what the engine tells becomes what the client is told."""

    def __init__(self, body: ChatRequest, serving: Serving, n: int) -> None:
        self.body, self.serving = body, serving
        self.id, self.created = wording.new_id("chatcmpl"), int(time.time())
        reads = bool(body.tools) and body.tool_choice != "none"
        self.choices = [_Choice(reads) for _ in range(n)]

    # --- at once ---------------------------------------------------------------------------------------------------

    def take(self, event: Event) -> None:
        """Take what the engine tells."""
        if isinstance(event, Delta):
            choice = self.choices[event.index]
            choice.push(event.text)
            choice.logprobs += wording.chat_logprobs(self.serving.vocabulary, event.logprobs)
        elif isinstance(event, Done):
            self.choices[event.index].end(event)

    def completion(self) -> dict[str, Any]:
        """Return the whole answer."""
        return self._head("chat.completion") | {
            "choices": [self._choice(index, choice) for index, choice in enumerate(self.choices)],
            "usage": self._usage(),
        }

    def _choice(self, index: int, choice: _Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.calls:
            message["content"] = choice.text or None
            message["tool_calls"] = [self._call(call) for call in choice.calls]
        if self.body.citations and choice.done is not None:
            message["citations"] = wording.citations_of(choice.done.citations)
        return {
            "index": index,
            "message": message,
            "logprobs": {"content": choice.logprobs, "refusal": None} if self.body.logprobs else None,
            "finish_reason": choice.reason,
        }

    # --- as a stream -----------------------------------------------------------------------------------------------

    async def chunks(self, events: answering.Numbered) -> AsyncIterator[ServerSentEvent]:
        """Make chunks of the engine's events."""
        begun: set[int] = set()
        async for _, event in events:
            if isinstance(event, Progress):
                yield answering.read_so_far(event)
            elif isinstance(event, Delta | Done):
                if event.index not in begun:
                    begun.add(event.index)
                    yield self._chunk(event.index, {"role": "assistant", "content": "", "refusal": None})
                for each in self._deltas(event):
                    yield each
        if self.body.usage_wanted:
            yield answering.data(self._head("chat.completion.chunk") | {"choices": [], "usage": self._usage()})
        yield answering.ended()

    def _deltas(self, event: Delta | Done) -> list[ServerSentEvent]:
        index, choice = event.index, self.choices[event.index]
        if isinstance(event, Done):
            rest = choice.end(event)
            made = [self._chunk(index, {"content": rest})] if rest else []
            last: dict[str, Any] = {"citations": wording.citations_of(event.citations)} if self.body.citations else {}
            return [*made, self._chunk(index, last, choice.reason)]
        before = len(choice.calls)
        shown, calls = choice.push(event.text)
        told = wording.chat_logprobs(self.serving.vocabulary, event.logprobs)
        made = [self._chunk(index, {"content": shown}, logprobs=told)] if shown or told else []
        for number, call in enumerate(calls, before):
            made.append(self._chunk(index, {"tool_calls": [{"index": number, **self._call(call)}]}))
        return made

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        reason: str | None = None,
        logprobs: list[dict[str, Any]] | None = None,
    ) -> ServerSentEvent:
        told = {"content": logprobs, "refusal": None} if self.body.logprobs and logprobs else None
        choice = {"index": index, "delta": delta, "logprobs": told, "finish_reason": reason}
        usage = {"usage": None} if self.body.usage_wanted else {}
        return answering.data(self._head("chat.completion.chunk") | {"choices": [choice]} | usage)

    # --- both ------------------------------------------------------------------------------------------------------

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.serving.name}

    def _usage(self) -> dict[str, Any]:
        return wording.usage_of(choice.done.usage if choice.done else Usage() for choice in self.choices)

    @staticmethod
    def _call(call: tools.Call) -> dict[str, Any]:
        return {
            "id": wording.new_id("call"),
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
