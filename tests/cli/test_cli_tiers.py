"""`--kv-tier`: a budget that a text does not fit, and what moved below it, told in JSON, in a line and in a chat."""

from __future__ import annotations

import json

import pytest

QUEST = ("--attention", "quest:budget=128,window=64")
CHUNK = 512
"""Tokens that are read together, and must fit the budget."""


@pytest.fixture
def token_bytes(tiny_model):
    """Of keys and values, three layers with two KV heads of 8: in the number type that this machine computes in."""
    from longspan.hf.loading import load

    return 3 * 2 * 2 * 8 * load(str(tiny_model), device="cpu").dtype.itemsize


@pytest.fixture
def kept(token_bytes):
    """A budget that holds a chunk and a few pages."""
    return (*QUEST, "--kv-budget", str((CHUNK + 400) * token_bytes * 5 // 4))


@pytest.fixture
def long_note(tmp_path):
    note = tmp_path / "long.txt"
    note.write_text(" ".join(f"Parcel {i} lies in hall {i * 7 % 13}." for i in range(90)))
    return str(note)


def test_a_text_beyond_the_budget_is_answered_from_below(cli, tiny_model, long_note, tmp_path, kept, token_bytes):
    common = ("ask", "Where is parcel 9?", "--model", str(tiny_model), "--doc", long_note, "--max-tokens", "4")
    code, _, err = cli(*common, *kept)
    assert code == 1 and "raise it (--kv-budget)" in err
    told = cli(*common, *QUEST, "--json")
    folder = tmp_path / "below"
    host = 4 * 64 * token_bytes
    code, out, err = cli(*common, *kept, "--kv-tier", f"host={host},disk=20MB:{folder}", "--json")
    assert code == 0, err
    found, free = json.loads(out), json.loads(told[1])
    assert found["answer"] == free["answer"] and "tiers" not in free
    tiers = found["tiers"]
    assert tiers["host_down"] and tiers["disk_down"] and tiers["disk_bytes"] and tiers["host_bytes"] <= host
    assert {"hits", "waits", "misses", "host_up", "disk_up"} <= set(tiers)
    assert not list(folder.iterdir())
    code, _, err = cli(*common, *kept, "--kv-tier", "host=2MB")
    assert code == 0 and "tiers: host" in err and "moved down" in err


def test_a_chat_tells_it_with_its_statistics(longspan, long_note, kept):
    done = longspan(
        "chat", "--doc", long_note, *kept, "--kv-tier", "host=2MB", "--max-tokens", "3",
        stdin=b"Where is parcel 9?\n/stats\n",
    )  # fmt: skip
    assert done.returncode == 0 and b"tiers: host" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "options,why",
    [
        (("--kv-tier", "host=1GB"), "give --kv-budget as well"),
        (("--kv-budget", "5MB", "--kv-tier", "disk=1GB"), "names no folder"),
        (("--kv-budget", "5MB", "--kv-tier", "disk=1GB:/proc/none"), "can't write"),
        (("--attention", "h2o", "--kv-budget", "5MB", "--kv-tier", "host=1GB"), "leave out --kv-tier"),
    ],
)
def test_what_can_not_be_is_one_line(cli, tiny_model, long_note, options, why):
    code, _, err = cli("ask", "Where?", "--model", str(tiny_model), "--doc", long_note, *options)
    assert code != 0 and why in err and "Traceback" not in err


def test_tiers_too_small_are_one_line(cli, tiny_model, long_note, kept):
    code, _, err = cli("ask", "Where?", "--model", str(tiny_model), "--doc", long_note, *kept, "--kv-tier", "host=7KB")
    assert code != 0 and "raise --kv-tier" in err and "Traceback" not in err


def test_a_budget_that_does_not_hold_a_chunk_says_so(cli, tiny_model, long_note):
    common = ("--model", str(tiny_model), "--doc", long_note, "--attention", "quest")
    code, _, err = cli("ask", "Where?", *common, "--kv-budget", "100KB", "--kv-tier", "host=1GB")
    assert code != 0 and "that are read next: raise it (--kv-budget)" in err
