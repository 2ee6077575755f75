"""Which replica a request goes to, behind Ray Serve; what Ray does with it is checked by `on_ray.py`."""

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "deploy"))
import ray_serve
from ray_serve import home, session_of

NAMES = [f"replica_{i}" for i in range(4)]


@pytest.mark.parametrize(
    ("path", "body", "session"),
    [
        ("/v1/sessions/lease/ask", b'{"question": "And?", "name": "other"}', "lease"),
        ("/v1/sessions/lease", b"", "lease"),
        ("/v1/sessions/lease/fork", b'{"name": "copy"}', "lease"),
        ("/v1/sessions", b'{"name": "lease"}', "lease"),
        ("/v1/sessions/", b'{"name": "lease"}', "lease"),
        ("/v1/sessions", b"", None),
        ("/v1/chat/completions", b' {"session_id": "lease", "name": "x"}', "lease"),
        ("/v1/chat/completions", b'{"messages": []}', None),
        ("/v1/chat/completions", b'{"session_id": 7}', None),
        ("/v1/chat/completions", b'{"session_id": ', None),
        ("/v1/chat/completions", b'["session_id"]', None),
        ("/metrics", b"\xff\xfe", None),
    ],
)
def test_the_session_of_a_request(path, body, session):
    assert session_of(path, body) == session


def test_sessions_spread_and_stay():
    sessions = [f"session {i}" for i in range(4000)]
    at_home = {name: home(name, NAMES) for name in sessions}
    assert all(800 < count < 1200 for count in Counter(at_home.values()).values())
    assert at_home == {name: home(name, NAMES[::-1]) for name in sessions}
    fewer = {name: home(name, NAMES[:3]) for name in sessions}
    moved = [name for name in sessions if fewer[name] != at_home[name]]
    assert {at_home[name] for name in moved} == {NAMES[3]}, "only those of the replica that went"


def test_an_unknown_option_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", type(sys)("ray"))
    sys.modules["ray"].serve = None
    with pytest.raises(ValueError, match="unknown option 'gpu': use attention"):
        ray_serve.app({"replicas": "2", "gpu": "1"})
