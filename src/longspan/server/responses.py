"""`/v1/responses`: OpenAI's newer form of a conversation, for text; nothing is kept of a response."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from fastapi.responses import Response
from sse_starlette import ServerSentEvent

from longspan.engine.sampler import SamplingParams
from longspan.engine.serving import Delta, Done, Event, Progress, Request
from longspan.server import answering, constraint, prompting, wording
from longspan.server.response_fields import ResponsesRequest
from longspan.server.serving import Serving, key_of, note_user, serving_of

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/responses", summary="Go on with a conversation (OpenAI's newer form)")
async def responses(
    body: ResponsesRequest, http: HttpRequest, serving: Annotated[Serving, Depends(serving_of)]
) -> Response:
    """Answer a conversation in text, at once or as a stream of server-sent events."""
    serving.check_model(body.model)
    body.check()
    note_user(http, body.user or body.safety_identifier)
    session = None if body.session_id is None else serving.session(http, body.session_id)
    asked = await anyio.to_thread.run_sync(_request, body, serving, key_of(http), session)
    handle = serving.submit(asked)
    answer = _Answer(body, serving)
    if body.stream:
        return await answering.stream(http, [handle], answer.events, serving.options.send_seconds)
    await answering.all_events(http, [handle], lambda _, event: answer.take(event))
    return answering.whole(answer.response())


def _request(body: ResponsesRequest, serving: Serving, key: str, session: str | None) -> Request:
    most = serving.answer_tokens(body.max_output_tokens)
    temperature = 1.0 if body.temperature is None else body.temperature
    if body.top_p == 0:
        temperature = 0.0
    common: dict[str, Any] = {
        "params": SamplingParams(most, temperature, body.top_p or 1.0), "key": key, "citations": False,
    }  # fmt: skip
    if session is not None:
        return Request(messages=body.messages, session=session, makes_session=False, **common)
    form = body.text.format if body.text is not None else None
    follow = None
    if form is not None and form.type != "text":
        schema = form.schema_ if form.type == "json_schema" else {"type": "object"}
        follow = constraint.of_schema(serving.vocabulary, schema, "text.format")
    return Request(text=prompting.of_texts(serving.model, body.messages), constraint=follow, **common)


class _Answer:
    """A response under way."""

    def __init__(self, body: ResponsesRequest, serving: Serving) -> None:
        self.body, self.serving = body, serving
        self.id, self.message_id = wording.new_id("resp"), wording.new_id("msg")
        self.created, self.text = int(time.time()), ""
        self.done: Done | None = None
        self.number = 0

    def take(self, event: Event) -> None:
        """Take what the engine tells."""
        if isinstance(event, Delta):
            self.text += event.text
        elif isinstance(event, Done):
            self.done = event

    async def events(self, events: answering.Numbered) -> AsyncIterator[ServerSentEvent]:
        """Make the stream's events of the engine's."""
        yield self._event("response.created", response=self.response())
        yield self._event("response.in_progress", response=self.response())
        place = {"output_index": 0, "item_id": self.message_id, "content_index": 0}
        yield self._event("response.output_item.added", output_index=0, item=self._message([]))
        yield self._event("response.content_part.added", **place, part=self._part(""))
        async for _, event in events:
            self.take(event)
            if isinstance(event, Progress):
                yield answering.read_so_far(event)
            elif isinstance(event, Delta) and event.text:
                yield self._event("response.output_text.delta", **place, delta=event.text, logprobs=[])
        yield self._event("response.output_text.done", **place, text=self.text, logprobs=[])
        yield self._event("response.content_part.done", **place, part=self._part(self.text))
        yield self._event("response.output_item.done", output_index=0, item=self._message([self._part(self.text)]))
        yield self._event(f"response.{self._status}", response=self.response())

    def response(self) -> dict[str, Any]:
        """Return the response as it is now."""
        body, done = self.body, self.done
        form = body.text.format if body.text is not None else None
        usage = None if done is None else wording.usage_of([done.usage])
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": self._status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if self._status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self.serving.name,
            "output": [] if done is None else [self._message([self._part(self.text)])],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": "none",
            "tools": [],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None if usage is None else {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"],
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
            "metadata": {},
        }  # fmt: skip

    @property
    def _status(self) -> str:
        if self.done is None:
            return "in_progress"
        return "incomplete" if self.done.finish_reason == "length" else "completed"

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.message_id, "type": "message", "role": "assistant", "status": self._status, "content": content,
        }  # fmt: skip

    @staticmethod
    def _part(text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _event(self, kind: str, **told: Any) -> ServerSentEvent:
        number, self.number = self.number, self.number + 1
        return answering.data({"type": kind, "sequence_number": number, **told}, event=kind)
