"""Connections that do not come to the point are closed, whichever request of theirs it is."""

import socket
import time

import pytest

from longspan.server import listening


@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"])
def test_a_head_that_does_not_end_is_given_up(live, before, monkeypatch):
    monkeypatch.setattr(listening, "_HEADER_SECONDS", 0.2)
    with socket.create_connection(live.address, timeout=5) as made:
        if before:
            made.sendall(before)
            answer = b""
            while not answer.endswith(b"}"):
                answer += made.recv(1000)
            assert answer.startswith(b"HTTP/1.1 200")
        started = time.perf_counter()
        made.sendall(b"GET /health HT")
        assert made.recv(1000) == b"", "it was not closed"
        assert time.perf_counter() - started < 3
