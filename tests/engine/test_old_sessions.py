"""Sessions in the format before journals go on, and become journals with the next save."""

import hashlib
import json

import pytest
from safetensors.torch import save_file

from longspan.errors import SessionCorruptError
from longspan.sessions import upkeep
from longspan.sessions.store import Rows

QUESTION = "What is the code of the tower?"


def sealed(body):
    checksum = hashlib.blake2b(body, digest_size=16).hexdigest()
    return b'{"checksum": "' + checksum.encode() + b'", "manifest": ' + body + b"}\n"


def write_old(llm, session):
    """Write a session as it was written before journals."""
    folder = llm.store.root / session.name
    folder.mkdir(parents=True)
    state, documents, _ = session.to_saved()
    state["turns"] = [{"question": turn.question, "answer": turn.answer} for turn in session.turns]
    state["memory"] = {"mechanism": session.memory.mechanism.describe(), "length": session.memory.length}
    groups = {"documents": documents, "memory": session.memory.tensors()}
    blobs = {}
    for group, tensors in groups.items():
        held = {name: each.tensor if isinstance(each, Rows) else each for name, each in tensors.items()}
        save_file({name: each.contiguous() for name, each in held.items()}, folder / "part")
        data = (folder / "part").read_bytes()
        checksum = hashlib.blake2b(data, digest_size=16).hexdigest()
        (folder / "part").rename(folder / f"{checksum}.safetensors")
        blobs[group] = {"file": f"{checksum}.safetensors", "bytes": len(data), "checksum": checksum}
    data = json.dumps({str(i): document.text for i, document in enumerate(session.documents)}).encode()
    checksum = hashlib.blake2b(data, digest_size=16).hexdigest()
    (folder / f"{checksum}.json").write_bytes(data)
    inner = {
        "format": 1,
        "name": session.name,
        "created": "2026-11-01T10:00:00+00:00",
        "saved": "2026-11-02T10:00:00+00:00",
        "identity": llm._identity(),
        "state": state,
        "groups": blobs,
        "texts": {"file": f"{checksum}.json", "bytes": len(data), "checksum": checksum},
    }
    (folder / "manifest.json").write_bytes(sealed(json.dumps(inner).encode()))
    return folder


@pytest.fixture
def old(make_llm, text):
    llm = make_llm("dense")
    session = llm.session("codes")
    llm.add_text(session, text, "codes.txt")
    llm.ask(QUESTION, session, max_tokens=6, remember=True)
    return llm, session, write_old(llm, session)


def test_an_old_session_goes_on_and_becomes_a_journal(make_llm, old):
    llm, session, folder = old
    expected = llm.ask("And the museum?", session, max_tokens=20).text
    other = make_llm("dense")
    info = other.store.show("codes")
    assert info.created is not None and info.created.day == 1 and info.bytes > 1000 and info.problem is None
    restored = other.session("codes")
    assert restored.turns == session.turns and restored.documents == session.documents
    assert other.ask("And the museum?", restored, max_tokens=20).text == expected
    assert upkeep.verify(other.store) == []
    other.save(restored)
    (journal,) = folder.iterdir()
    assert journal.suffix == ".journal" and other.store.show("codes").created == info.created
    again = make_llm("dense")
    assert again.ask("And the museum?", again.session("codes"), max_tokens=20).text == expected


def test_an_old_session_is_forked(make_llm, old):
    llm, session, _ = old
    llm.store.fork("codes", "other")
    assert make_llm("dense").session("other").turns == session.turns
    assert make_llm("dense").session("codes").turns == session.turns


@pytest.mark.parametrize("spoil", ["manifest", "memory", "texts", "gone", "later"])
def test_damage_of_an_old_session_is_told(make_llm, old, spoil):
    _, _, folder = old
    path = {
        "manifest": folder / "manifest.json",
        "memory": max(folder.glob("*.safetensors"), key=lambda each: each.stat().st_size),
        "texts": next(each for each in folder.glob("*.json") if each.name != "manifest.json"),
    }.get(spoil, folder / "manifest.json")
    data = bytearray(path.read_bytes())
    if spoil == "gone":
        next(folder.glob("*.safetensors")).unlink()
    elif spoil == "later":
        path.write_bytes(sealed(b'{"format": 7}'))
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with pytest.raises(SessionCorruptError, match="update longspan" if spoil == "later" else "damaged"):
        make_llm("dense").session("codes")
    assert upkeep.verify(make_llm("dense").store) != []
