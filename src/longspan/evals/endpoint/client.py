"""Sends requests to an endpoint of the OpenAI protocol, and tries again where that may help.

Tried again, with growing pauses: refused and broken connections, answers that come too late or end in the middle, and
the statuses 408, 409, 425, 429 and 5xx. Where the endpoint says when (`Retry-After`), all requests wait until then.
What one question alone is to blame for (`Refused`) is told apart from what would befall every other.

The key goes into a header and nowhere else: messages of the endpoint are shown without it. It may be called by several
threads. It does not know questions.
"""

from __future__ import annotations

import contextlib
import random
import re
import socket
import threading
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import httpx2

from longspan.errors import Cancelled, EndpointError, UsageError
from longspan.evals.endpoint.stream import Answer, BrokenAnswerError, ToldError, streamed, whole

TRIES = 6
_AGAIN = frozenset({408, 409, 425, 429})
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
"""Seconds, without a word from the endpoint."""
_LONGEST_WISH = 600.0
"""Seconds that an endpoint may ask to wait."""
_TOO_LONG = re.compile(
    r"context.{0,20}(length|window|size)|maximum.{0,20}(length|tokens)|too (long|large|many (input )?tokens)"
    r"|exceed\w*.{0,40}(tokens|context|length)|longer than|max_new_tokens",
    re.IGNORECASE,
)


_HOST = re.compile(r"(?:[^/?#]*:)?/*[^/?#]*")
"""What a URL begins with, up to its path; a user and a password would stand in it, however odd the rest is."""


class Refused(Exception):
    """This question can't be answered by the endpoint; others may."""


class Client:
    """One endpoint and one model of it."""

    def __init__(
        self, url: str, key: str, *, parallel: int, timeout: float, tell: Callable[[str], None] = lambda _: None
    ) -> None:
        """Take an endpoint; nothing is sent yet.

        Args:
            url: of the protocol's root, such as `http://127.0.0.1:8000/v1`.
            key: sent as a bearer token; empty: none is.
            parallel: requests at once.
            timeout: seconds that an endpoint may be silent.
            tell: told why something is tried again.

        Raises:
            UsageError: no such URL.
        """
        self.url = _checked(url)
        self._key, self._tell, self._wait_until = key, tell, 0.0
        self._stopped, self._lock, self._sockets = threading.Event(), threading.Lock(), list[socket.socket]()
        # Of the request's fields, those that the endpoint turned out not to know, and what takes their place.
        self._replaced: dict[str, str | None] = {}
        self._http = httpx2.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(timeout, connect=min(timeout, 10.0), pool=None),
            limits=httpx2.Limits(max_connections=parallel + 1),
        )

    def model(self, wanted: str | None) -> str:
        """Return the name of the model to ask: the one that was named, or the only one there is.

        Raises:
            UsageError: the endpoint has several, or does not tell, and none was named.
            EndpointError: it can't be reached, refuses the key, or has no model of that name.
        """
        try:
            response = self._http.get(f"{self.url}/models", extensions={"trace": self._trace})
            names = [str(each["id"]) for each in response.json()["data"]] if response.status_code == 200 else []
        except httpx2.TransportError as error:
            raise self._unreachable(error) from error
        except (ValueError, KeyError, TypeError):
            names = []  # it answers, in a way of its own
        if response.status_code in (401, 403):
            raise self._unauthorised(response.status_code)
        if wanted is None:
            if len(names) != 1:
                told = f"it has {_listed(names)}" if names else "it does not list its models"
                raise UsageError(f"name the model of {self.url} with --model: {told}")
            return names[0]
        if names and wanted not in names:
            raise EndpointError(f"{self.url} has no model {wanted!r}: use --model with one of {_listed(names)}")
        return wanted

    def ask(self, path: str, body: dict[str, Any]) -> Answer:
        """Send a request, as often as it takes, and return its answer.

        Args:
            path: after the URL: `chat/completions` or `completions`.
            body: JSON.

        Raises:
            Refused: this question can't be answered, for its length or what it says.
            EndpointError: no question can be answered, or the endpoint keeps failing.
            Cancelled: the client was closed.
        """
        for attempt in range(TRIES):
            self._pause()
            try:
                return self._once(path, body)
            except _AgainError as error:
                last = error
            if attempt + 1 < TRIES:
                # A random share, so that requests that failed together do not come together again.
                pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**attempt) * (0.5 + random.random() / 2)
                if last.wish is not None:
                    if last.wish > _LONGEST_WISH:
                        raise EndpointError(f"{self.url} asks to wait {last.wish:.0f} s: go on after that ({last})")
                    pause = last.wish
                self._tell(f"{last}: trying again in {pause:.0f} s")
                self._delay(pause, everyone=last.wish is not None)
        raise EndpointError(f"{self.url} failed {TRIES} times, at last: {last}")

    def close(self) -> None:
        """End all requests: threads that wait for an answer raise `Cancelled` at once."""
        self._stopped.set()
        with self._lock:
            for each in self._sockets:
                _shut(each)
        self._http.close()

    def _once(self, path: str, body: dict[str, Any]) -> Answer:
        with self._lock:
            given = {self._replaced.get(name, name): value for name, value in body.items()}
        fields = {name: value for name, value in given.items() if name is not None}
        answer = Answer()
        try:
            with self._http.stream(
                "POST", f"{self.url}/{path}", json=fields, extensions={"trace": self._trace}
            ) as response:
                if response.status_code == 200:
                    if "text/event-stream" in response.headers.get("content-type", ""):
                        return streamed(response.iter_lines(), answer)
                    return whole(response.read(), answer)
                response.read()
        except ToldError as error:
            code = error.error.get("code") if isinstance(error.error, dict) else None
            raise self._meant(code if isinstance(code, int) else 500, error.error, path) from error
        except BrokenAnswerError as error:
            raise _AgainError(str(error)) from error
        except httpx2.TransportError as error:
            if self._stopped.is_set():
                raise Cancelled("stopped") from error
            raise _AgainError(_reason(error)) from error
        try:
            found = response.json()
        except ValueError:
            found = response.text
        told = found.get("error", found) if isinstance(found, dict) else found
        if response.status_code in (400, 422) and self._adapt(_message(told), fields):
            return self._once(path, body)
        if response.is_redirect:
            raise EndpointError(f"{self.url} has moved to {response.headers['location']}: give the URL that it has now")
        raise self._meant(response.status_code, told, path, _wish(response.headers.get("retry-after")))

    def _adapt(self, told: str, fields: dict[str, Any]) -> bool:
        """Leave out, or call by its other name, a field that an endpoint says it does not know; return whether."""
        for name, other in (("max_tokens", "max_completion_tokens"), ("stream_options", None), ("temperature", None)):
            if name in fields and (other or name) in told:
                with self._lock:
                    self._replaced[name] = other
                return True
        return False

    def _meant(self, status: int, error: object, path: str, wish: float | None = None) -> Exception:
        """Return what an error of an endpoint means."""
        told, code = self._shown(_message(error)), str(error.get("code")) if isinstance(error, dict) else ""
        if status in _AGAIN or status >= 500:
            return _AgainError(f"{status} {told}".strip(), wish)
        if status in (401, 403):
            return self._unauthorised(status, told)
        if status == 404 and ("model" in told.lower() or "model" in code):
            return EndpointError(f"{self.url} does not serve the model: {told}")
        if status == 404:
            return EndpointError(f"{self.url} has no {path}: give the protocol's root, such as http://host/v1")
        if status == 413 or "context_length" in code or _TOO_LONG.search(told):
            return Refused(f"the context is too long: {told}")
        if "content_filter" in code or "content_policy" in code:
            return Refused(f"refused for what it says: {told}")
        return EndpointError(f"{self.url} refuses the request ({status}): {told}")

    def _unauthorised(self, status: int, told: str = "") -> EndpointError:
        if self._key:
            return EndpointError(f"{self.url} refuses the key ({status}): {told or 'give another'}")
        return EndpointError(
            f"{self.url} wants a key ({status}): set LONGSPAN_API_KEY, or name a variable with --api-key-env or a file "
            "with --api-key-file"
        )

    def _unreachable(self, error: httpx2.TransportError) -> EndpointError:
        return EndpointError(f"can't reach {self.url}: {_reason(error)}: is it running, and the URL right?")

    def _shown(self, told: str) -> str:
        """Return a message of the endpoint as one line, without the key."""
        line = " ".join(told.split())[:300]
        return line.replace(self._key, "[key]") if self._key else line

    def _pause(self) -> None:
        """Wait until requests are welcome again."""
        while (left := self._wait_until - time.monotonic()) > 0:
            if self._stopped.wait(left):
                break
        if self._stopped.is_set():
            raise Cancelled("stopped")

    def _delay(self, seconds: float, *, everyone: bool) -> None:
        if everyone:
            with self._lock:
                self._wait_until = max(self._wait_until, time.monotonic() + seconds)
        elif self._stopped.wait(seconds):
            raise Cancelled("stopped")

    def _trace(self, name: str, info: dict[str, Any]) -> None:
        """Keep the sockets of connections, which `close` shuts."""
        if name in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            found = info["return_value"].get_extra_info("socket")
            with self._lock:
                self._sockets = [each for each in self._sockets if each.fileno() >= 0] + [found]
                if self._stopped.is_set():  # it was being opened while the client was closed
                    _shut(found)


class _AgainError(Exception):
    """Something that may go well another time."""

    def __init__(self, told: str, wish: float | None = None) -> None:
        super().__init__(told)
        self.wish = wish
        """Seconds to wait, as the endpoint wishes."""


def _shut(each: socket.socket) -> None:
    """End a connection: closing it would not wake a thread that reads from it."""
    with contextlib.suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)


def _checked(url: str) -> str:
    begun = _HOST.match(url)
    if begun is not None and "@" in begun[0]:
        # Before anything else is said of it: a message would show it.
        raise UsageError("--base-url has a user or password in it, which would be kept with the answers: leave it out")
    try:
        found = urlsplit(url)
        host, _ = found.hostname, found.port
        httpx2.URL(url)  # it refuses control characters
        (host or "").encode("idna")  # as sockets do, with a UnicodeError: an empty part, or one that is too long
    except (ValueError, httpx2.InvalidURL) as error:
        raise UsageError(f"--base-url {url!r} is no URL: {error}") from error
    if found.scheme not in ("http", "https") or not host or found.query or found.fragment:
        raise UsageError(f"--base-url {url!r} is no endpoint: write one like http://127.0.0.1:8000/v1")
    return url.rstrip("/")


def _wish(header: str | None) -> float | None:
    """Return the seconds of a `Retry-After`, which are a number or a date (None: neither)."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None


def _message(error: object) -> str:
    """Return what an error says, in whichever of the forms that endpoints use."""
    if isinstance(error, dict):
        return str(error.get("message") or error.get("detail") or error)
    return str(error)


def _reason(error: httpx2.TransportError) -> str:
    if isinstance(error, httpx2.TimeoutException):
        return "no word in the time allowed (--timeout)"
    return str(error).removeprefix("[Errno 111] ") or type(error).__name__


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
