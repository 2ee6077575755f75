"""`/v1/completions`: texts or tokens are gone on from, as they are; with `echo` and `logprobs` they are scored."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from fastapi.responses import Response
from sse_starlette import ServerSentEvent

from longspan.engine.serving import Delta, Done, Event, Handle, Progress, PromptRead, Request, TokenLogprob
from longspan.server import answering, wording
from longspan.server.completion_fields import CompletionRequest
from longspan.server.refusals import ApiError
from longspan.server.serving import Serving, key_of, note_user, serving_of

router = APIRouter(tags=["OpenAI"])
_USUAL = 16
"""Tokens of an answer where the client does not say, as OpenAI's."""


@router.post("/v1/completions", summary="Go on with a text")
async def completions(
    body: CompletionRequest, http: HttpRequest, serving: Annotated[Serving, Depends(serving_of)]
) -> Response:
    """Go on with one text or several, at once or as a stream of server-sent events."""
    serving.check_model(body.model)
    body.check()
    note_user(http, body.user or body.safety_identifier)
    answer = _Answer(body, serving)
    handles: list[Handle] = []
    try:
        for prompt in body.prompts:
            handles.append(serving.submit(_request(body, prompt, serving, key_of(http))))
    except Exception:
        for handle in handles:
            handle.cancel()
        raise
    if body.stream:
        return await answering.stream(http, handles, answer.chunks, serving.options.send_seconds)
    await answering.all_events(http, handles, answer.take)
    return answering.whole(answer.completion())


def _request(body: CompletionRequest, prompt: str | list[int], serving: Serving, key: str) -> Request:
    if isinstance(prompt, list):
        known = int(serving.model.config.vocab_size)
        if wrong := [token for token in prompt if token >= known]:
            raise ApiError(400, f"'prompt' holds token {wrong[0]}: the model has {known}", param="prompt")
    return Request(
        text=prompt if isinstance(prompt, str) else None,
        tokens=prompt if isinstance(prompt, list) else None,
        params=body.params(_USUAL if body.max_tokens is None else max(1, body.max_tokens)),
        key=key,
        n=body.n or 1,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
        citations=False,
    )


class _Choice:
    """One choice as it grows: text, and probabilities where they are asked for."""

    def __init__(self) -> None:
        self.text, self.reason, self.length = "", "", 0
        self.logprobs: dict[str, list[Any]] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": [],
        }  # fmt: skip

    def add(self, serving: Serving, tokens: Iterable[tuple[int, TokenLogprob | None]]) -> dict[str, list[Any]]:
        """Add tokens with their probabilities (None: it has none), and return what was added."""
        new: dict[str, list[Any]] = {name: [] for name in self.logprobs}
        for token, told in tokens:
            text = wording.text_of(serving.vocabulary, token)
            new["tokens"].append(text)
            new["text_offset"].append(self.length)
            new["token_logprobs"].append(None if told is None else wording.finite(told.logprob))
            new["top_logprobs"].append(None if told is None else _top(serving, told))
            self.length += len(text)
        for name, values in new.items():
            self.logprobs[name] += values
        return new


def _top(serving: Serving, told: TokenLogprob) -> dict[str, float]:
    """Return the likeliest tokens by their texts, the one that came among them; of equal texts the likeliest stands."""
    found: dict[str, float] = {}
    for token, logprob in (*told.top, (told.token, told.logprob)):
        found.setdefault(wording.text_of(serving.vocabulary, token), wording.finite(logprob))
    return found


class _Answer:
    """An answer under way: choice `number * n + index` is the one of that index to the prompt of that number."""

    def __init__(self, body: CompletionRequest, serving: Serving) -> None:
        self.body, self.serving, self.n = body, serving, body.n or 1
        self.id, self.created = wording.new_id("cmpl"), int(time.time())
        self.choices = [_Choice() for _ in range(self.n * len(body.prompts))]
        self.ends: dict[int, list[Done]] = {}
        if body.echo:
            for at, prompt in enumerate(body.prompts):
                text = prompt if isinstance(prompt, str) else serving.model.decode(prompt)
                for choice in self.choices[at * self.n : (at + 1) * self.n]:
                    choice.text = text
                    choice.length = 0 if body.logprobs is not None else len(text)

    # --- at once ---------------------------------------------------------------------------------------------------

    def take(self, number: int, event: Event) -> None:
        """Take what the engine tells of a prompt."""
        if isinstance(event, PromptRead):
            for choice in self.choices[number * self.n : (number + 1) * self.n]:
                choice.add(self.serving, _scored(event))
        elif isinstance(event, Delta) and self.body.max_tokens != 0:
            choice = self.choices[number * self.n + event.index]
            choice.text += event.text
            choice.add(self.serving, _written(event))
        elif isinstance(event, Done):
            self.choices[number * self.n + event.index].reason = self._reason(event)
            self.ends.setdefault(number, []).append(event)

    def completion(self) -> dict[str, Any]:
        """Return the whole answer."""
        return self._head() | {
            "choices": [
                self._choice(index, choice.text, choice.logprobs, choice.reason)
                for index, choice in enumerate(self.choices)
            ],
            "usage": self._usage(),
        }

    # --- as a stream -----------------------------------------------------------------------------------------------

    async def chunks(self, events: answering.Numbered) -> AsyncIterator[ServerSentEvent]:
        """Make chunks of the engine's events."""
        echoed: set[int] = set()
        async for number, event in events:
            if isinstance(event, Progress):
                yield answering.read_so_far(event)
                continue
            if (
                number not in echoed
                and self.body.echo
                and (self.body.logprobs is None) != isinstance(event, PromptRead)
            ):
                echoed.add(number)
                for each in self._echo(number, event):
                    yield each
            if isinstance(event, Delta) and self.body.max_tokens != 0:
                index = number * self.n + event.index
                told = self.choices[index].add(self.serving, _written(event))
                if event.text or event.logprobs:
                    yield self._chunk(index, event.text, told, None)
            elif isinstance(event, Done):
                self.ends.setdefault(number, []).append(event)
                yield self._chunk(number * self.n + event.index, "", None, self._reason(event))
        if self.body.usage_wanted:
            yield answering.data(self._head() | {"choices": [], "usage": self._usage()})
        yield answering.ended()

    def _echo(self, number: int, event: Event) -> Iterable[ServerSentEvent]:
        for index in range(number * self.n, (number + 1) * self.n):
            choice = self.choices[index]
            told = choice.add(self.serving, _scored(event)) if isinstance(event, PromptRead) else None
            yield self._chunk(index, choice.text, told, None)

    def _chunk(
        self, index: int, text: str, logprobs: dict[str, list[Any]] | None, reason: str | None
    ) -> ServerSentEvent:
        usage = {"usage": None} if self.body.usage_wanted else {}
        return answering.data(self._head() | {"choices": [self._choice(index, text, logprobs, reason)]} | usage)

    # --- both ------------------------------------------------------------------------------------------------------

    def _choice(
        self, index: int, text: str, logprobs: dict[str, list[Any]] | None, reason: str | None
    ) -> dict[str, Any]:
        told = logprobs if self.body.logprobs is not None else None
        return {"index": index, "text": text, "logprobs": told, "finish_reason": reason}

    def _reason(self, done: Done) -> str:
        return "length" if self.body.max_tokens == 0 else done.finish_reason

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.id, "object": "text_completion", "created": self.created, "model": self.serving.name,
        }  # fmt: skip

    def _usage(self) -> dict[str, Any]:
        found = wording.added([wording.usage_of(done.usage for done in ends) for ends in self.ends.values()])
        if self.body.max_tokens == 0:
            found |= {"completion_tokens": 0, "total_tokens": found["prompt_tokens"]}
        return found


def _scored(event: PromptRead) -> list[tuple[int, TokenLogprob | None]]:
    """Return the prompt's tokens with their probabilities; the first has none."""
    return list(zip(event.tokens, (None, *event.logprobs), strict=True))


def _written(event: Delta) -> list[tuple[int, TokenLogprob | None]]:
    return list(zip(event.tokens, event.logprobs, strict=True)) if event.logprobs else []
