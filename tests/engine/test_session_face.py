"""A session as people write it: in a `with` block, read into, asked, forked."""

import pytest

from longspan.engine import saving
from longspan.errors import UsageError
from longspan.sessions import upkeep
from longspan.sessions.session import Session


@pytest.fixture
def paths(tmp_path, text):
    (tmp_path / "codes.txt").write_text(text)
    (tmp_path / "more.txt").write_text("The lantern is in the cellar. " * 20)
    return tmp_path / "codes.txt", tmp_path / "more.txt"


def test_a_with_block_saves(make_llm, paths):
    llm = make_llm("dense")
    with llm.session("contracts") as session:
        session.append(paths[0])
        answer = session.ask("What is the code of the tower?", max_tokens=6)
    with make_llm("dense").session("contracts") as again:
        assert [turn.question for turn in again.turns] == ["What is the code of the tower?"]
        assert again.turns[0].answer == answer.text.strip()
        assert again.memory.length == session.memory.length


def test_what_was_read_is_saved_when_something_fails(make_llm, paths):
    llm = make_llm("dense")
    with pytest.raises(ZeroDivisionError), llm.session("contracts") as session:
        session.append(paths[0])
        session.ask("And?", max_tokens=3)
        raise ZeroDivisionError
    assert llm.store.load("contracts").state["turns"] == 1


def test_forks_go_their_own_way_in_memory_and_on_disk(make_llm, paths):
    llm = make_llm("dense")
    parent = llm.session("a")
    parent.append(paths[0])
    before = upkeep.used(llm.store)
    child = parent.fork("b")
    assert upkeep.used(llm.store) < 1.2 * before, "pages are shared on disk"
    assert llm.store.names() == ["a", "b"]
    child.append(paths[1])
    parent.ask("And?", max_tokens=3)
    parent.save()
    assert upkeep.used(llm.store) < 3.5 * before
    llm.store.remove("a")
    other = make_llm("dense")
    restored = other.session("b")
    assert len(restored.documents) == 2 and restored.turns == []
    question = "What is the code of the tower?"
    assert other.ask(question, restored, max_tokens=8).text == llm.ask(question, child, max_tokens=8).text
    assert upkeep.verify(llm.store) == []


def test_a_fork_of_what_another_process_has_changed_is_whole(make_llm, paths):
    llm, other = make_llm("dense"), make_llm("dense")
    session = llm.session("a")
    session.append(paths[0])
    there = other.session("a")
    there.append(paths[1])
    child = session.fork("b")
    child.save()
    restored = make_llm("dense").session("b")
    assert len(restored.documents) == 1 and restored.memory.length == session.memory.length


def test_a_session_of_nobody_can_not_be_asked():
    with pytest.raises(UsageError, match=r"llm\.session"):
        Session("x").ask("And?")
    with Session("x") as session:
        assert session.fork().name is None


def test_reading_is_saved_on_the_way(make_llm, text, monkeypatch):
    monkeypatch.setattr(saving.Pace, "due", lambda self: True)
    llm, lengths = make_llm("dense"), []
    session = llm.session("long")
    llm.add_text(session, text * 3, "codes.txt")

    def killed(what, done, total):
        if llm.store.exists("long"):
            lengths.append(make_llm("dense").session("long").memory.length)
        if len(lengths) == 2:
            raise SystemExit

    with pytest.raises(SystemExit):
        llm.prefill(session, killed)
    assert 0 < lengths[0] < lengths[1]
    other = make_llm("dense")
    restored = other.session("long")
    assert other.prefill(restored).cached_tokens == lengths[-1]
    whole = make_llm("dense", reuse=False)
    expected = whole.session()
    whole.add_text(expected, text * 3, "codes.txt")
    question = "What is the code of the tower?"
    assert other.ask(question, restored, max_tokens=8).text == whole.ask(question, expected, max_tokens=8).text
