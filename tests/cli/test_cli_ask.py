"""`longspan ask`: what it prints, what it keeps, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from cli_process import command

KEYS = {
    "quote",
    "answer",
    "citations",
    "session",
    "prompt_tokens",
    "cached_tokens",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "time_to_first_token_s",
    "attention",
    "model",
    "finish_reason",
    "stopped_by",
    "unsourced",
    "skipped",
    "notes",
}
SHORT = ("--max-tokens", "5")


def ask_json(cli, *arguments):
    code, out, err = cli("ask", "What is the code of the gate?", *SHORT, "--json", *arguments)
    assert code == 0, err
    return json.loads(out)


@pytest.mark.parametrize("attention", ["dense", "streaming:window=64", "superlinear:window=64", "retrieval"])
def test_json_has_all_keys_and_citations_are_slices(cli, home: Path, attention: str) -> None:
    answer = ask_json(cli, "--doc", "minutes.txt", "--attention", attention)
    assert set(answer) == KEYS
    text = (home / "minutes.txt").read_text()
    assert answer["citations"]
    for citation in answer["citations"]:
        assert set(citation) == {"doc", "start", "end", "text", "score", "chosen_by", "mass", "source"}
        assert citation["doc"] == "minutes.txt"
        assert citation["text"] == text[citation["start"] : citation["end"]] != ""
        assert set(citation["chosen_by"].split("+")) <= {"heads", "lexical", "attention"}
    assert answer["attention"] == attention
    assert answer["prefill_tokens_per_s"] > 0
    assert answer["time_to_first_token_s"] > 0
    assert (answer["finish_reason"], answer["stopped_by"]) in {("stop", "end"), ("length", "length")}
    assert answer["session"] is None
    assert answer["skipped"] == []


def test_in_a_process_of_its_own_only_json_is_on_stdout(longspan, home: Path) -> None:
    text = "Zoë’s naïve “notes” — 日本語 🙂\u2028 end. " * 5
    (home / "ünïcode.txt").write_text(text, encoding="utf-8")
    done = longspan("ask", "Who?", *SHORT, "--doc", "ünïcode.txt", "--json", env={"PYTHONIOENCODING": "latin-1"})
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.decode("utf-8"))
    assert answer["citations"][0]["doc"] == "ünïcode.txt"
    for citation in answer["citations"]:
        assert citation["text"] == text[citation["start"] : citation["end"]]
    assert "日本語" in done.stdout.decode("utf-8")
    assert b"reading" in done.stderr


def test_people_get_the_answer_then_passages_and_stats_on_stderr(cli) -> None:
    code, out, err = cli("ask", "Who keeps the key?", *SHORT, "--doc", "minutes.txt")
    assert code == 0
    answer, _, passages = out.partition("\nPassages it rests on:\n")
    assert answer.strip()
    assert "  1. minutes.txt, characters " in passages
    assert "score 0." in passages
    assert "tokens/s" in err
    assert "cached" in err
    assert "tokens/s" not in out


@pytest.mark.parametrize("attention", ["dense", "retrieval"])
def test_a_quotation_can_be_left_out(cli, attention: str) -> None:
    options = ("--doc", "minutes.txt", "--attention", attention)
    quoted, plain = ask_json(cli, *options), ask_json(cli, *options, "--no-quote")
    assert quoted["quote"].startswith("The text says: “") and any("quoted" in note for note in quoted["notes"])
    assert quoted["answer"].endswith(quoted["quote"]) and quoted["answer"].startswith(plain["answer"])
    assert plain["quote"] is None and plain["notes"] == []


def test_a_session_is_read_once_and_grows(cli) -> None:
    first = ask_json(cli, "--doc", "minutes.txt", "--session", "board")
    assert first["cached_tokens"] == 0
    again = ask_json(cli, "--session", "board")
    assert again["cached_tokens"] > 100
    assert again["prompt_tokens"] == first["prompt_tokens"]
    assert again["answer"] == first["answer"]
    assert [c["text"] for c in again["citations"]] == [c["text"] for c in first["citations"]]
    same = ask_json(cli, "--session", "board", "--doc", "minutes.txt")
    assert same["cached_tokens"] == again["cached_tokens"]
    Path("more.txt").write_text("The ferry to Riga leaves at nine. " * 9)
    grown = ask_json(cli, "--session", "board", "--doc", "more.txt")
    assert grown["prompt_tokens"] > again["prompt_tokens"]
    last = ask_json(cli, "--session", "board")
    assert last["cached_tokens"] > grown["cached_tokens"]


def test_standard_input_is_a_document(longspan) -> None:
    done = longspan("ask", "Who?", *SHORT, "--doc", "-", "--json", stdin=b"Ada wrote it. " * 20)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["citations"][0]["doc"] == "<stdin>"


def test_bad_files_of_a_folder_are_skipped_and_named(cli, home: Path) -> None:
    folder = home / "papers"
    folder.mkdir()
    (folder / "good.txt").write_text("The gate opens at six. " * 5)
    (folder / "junk.bin").write_bytes(bytes(range(256)) * 40)
    (folder / "empty.txt").write_text("")
    (folder / "gone.txt").symlink_to(home / "nowhere")
    code, out, err = cli("ask", "When?", *SHORT, "--doc", "papers", "--json")
    assert code == 0
    skipped = {each["name"]: each["reason"] for each in json.loads(out)["skipped"]}
    assert set(skipped) == {"papers/junk.bin", "papers/empty.txt", "papers/gone.txt"}
    for name, reason in skipped.items():
        assert f"skipped {name}: {reason}" in err


def test_sampling_options_reach_the_sampler(cli) -> None:
    options = ("--doc", "minutes.txt", "--temperature", "2", "--top-k", "50", "--top-p", "0.99", "--min-p", "0.001")
    one = ask_json(cli, *options, "--seed", "1")
    assert one["answer"] == ask_json(cli, *options, "--seed", "1")["answer"]
    assert one["answer"] != ask_json(cli, *options, "--seed", "2")["answer"]


REFUSED = {
    "nothing to ask": (["ask", "Who?"], 2, "--doc PATH"),
    "no such session": (["ask", "Who?", "--session", "other"], 2, "no session 'other' is saved: give --doc PATH"),
    "bad session name": (["ask", "Who?", "--session", "a/b", "--doc", "minutes.txt"], 2, "can't name a session"),
    "empty question": (["ask", "  ", "--doc", "minutes.txt"], 2, "the question is empty"),
    "missing file": (["ask", "Who?", "--doc", "gone.txt"], 1, "gone.txt: there is no such file or folder"),
    "empty file": (["ask", "Who?", "--doc", "empty.txt"], 1, "empty.txt: is empty"),
    "garbage": (["ask", "Who?", "--doc", "junk.bin"], 1, "junk.bin: is binary"),
    "unknown model": (["ask", "Who?", "--doc", "minutes.txt", "--model", "gpt9"], 2, "smollm2"),
    "unknown attention": (["ask", "Who?", "--doc", "minutes.txt", "--attention", "magic"], 2, "use one of dense, "),
    "unknown attention option": (
        ["ask", "Who?", "--doc", "minutes.txt", "--attention", "streaming:span=3"],
        2,
        "its options: sinks, window",
    ),
    "attention option of a wrong kind": (
        ["ask", "Who?", "--doc", "minutes.txt", "--attention", "streaming:sinks=few"],
        2,
        "must be int",
    ),
    "attention option beyond any context": (
        ["ask", "Who?", "--doc", "minutes.txt", "--attention", "streaming:window=99999999999999999999"],
        2,
        "'window' of attention 'streaming' is 99999999999999999999: give at most",
    ),
    "unknown format": (["ask", "Who?", "--doc", "minutes.txt", "--kv", "fp3"], 2, "'fp3': use one of auto, "),
    "no such device": (["ask", "Who?", "--doc", "minutes.txt", "--device", "tpu"], 2, "use auto, cpu or cuda"),
    "sampling out of range": (["ask", "Who?", "--doc", "minutes.txt", "--top-p", "1.5"], 2, "top_p is 1.5"),
    "no number": (["ask", "Who?", "--doc", "minutes.txt", "--top-k", "many"], 2, "(see: longspan ask --help)"),
    "no question": (["ask"], 2, "QUESTION"),
    "unknown option": (["ask", "Who?", "--docs", "minutes.txt"], 2, "--docs"),
    "unknown command": (["answer"], 2, "answer"),
    "question beyond the window": (["ask", "why " * 300, "--doc", "minutes.txt"], 1, "window holds 512"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_bad_input_is_one_line_and_an_exit_code(cli, home: Path, name: str, as_json: bool) -> None:
    (home / "empty.txt").write_text("")
    (home / "junk.bin").write_bytes(bytes(range(256)) * 40)
    arguments, wanted, fix = REFUSED[name]
    code, out, err = cli(*arguments, *(["--json"] if as_json and arguments[0] == "ask" else []))
    assert code == wanted
    assert out == ""
    lines = [line for line in err.splitlines() if not line.startswith("longspan: reading")]
    assert len(lines) == 1
    assert lines[0].startswith("longspan: ")
    assert fix in lines[0]


def test_a_question_beyond_the_window_is_refused_before_reading(cli) -> None:
    _, _, err = cli("ask", "why " * 300, "--doc", "minutes.txt")
    assert "reading" not in err


@pytest.mark.parametrize("arguments", [["--session", "board"], ["--session", "board", "--doc", "minutes.txt"]])
def test_a_corrupt_session_names_the_way_out(cli, home: Path, arguments: list[str]) -> None:
    ask_json(cli, "--doc", "minutes.txt", "--session", "board")
    for file in (home / "sessions" / "board").iterdir():
        data = file.read_bytes()
        file.write_bytes(data[: len(data) // 2])
    code, out, err = cli("ask", "Who?", *arguments, "--json")
    assert (code, out) == (1, "")
    assert "longspan session rm board" in err
    assert len(err.splitlines()) == 1


def test_a_session_of_another_attention_is_refused(cli) -> None:
    ask_json(cli, "--doc", "minutes.txt", "--session", "board")
    code, out, err = cli("ask", "Who?", "--session", "board", "--attention", "streaming")
    assert (code, out) == (1, "")
    assert "was saved with attention" in err


def test_what_can_not_be_saved_is_told_before_reading(cli, home: Path) -> None:
    (home / "sessions").write_text("a file where the folder should be")
    code, out, err = cli("ask", "Who?", "--doc", "minutes.txt", "--session", "board", "--json")
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert "can't save session 'board'" in err and "or set LONGSPAN_SESSIONS to another folder" in err


@pytest.mark.parametrize("threads", ["0", "two", "1025", "99999999999999999999"])
def test_a_number_of_threads_that_can_not_be_is_told(cli, monkeypatch: pytest.MonkeyPatch, threads: str) -> None:
    monkeypatch.setenv("LONGSPAN_THREADS", threads)
    code, out, err = cli("ask", "Who?", "--doc", "minutes.txt")
    assert (code, out) == (2, "")
    assert err == f"longspan: LONGSPAN_THREADS must be a whole number from 1 to 1024, not '{threads}'\n"


def test_memory_that_runs_out_is_no_bug(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_much(*_: object, **__: object) -> object:
        return bytes(1 << 60)

    def torch_too_much(*_: object, **__: object) -> object:
        import torch

        return torch.empty(1 << 58)

    for load in (too_much, torch_too_much):
        monkeypatch.setattr("longspan.cli.work.load", load)
        code, out, err = cli("ask", "Who?", "--doc", "minutes.txt")
        assert (code, out) == (1, "")
        assert err == "longspan: there is not enough memory: give less to read, a shorter length, or a smaller model\n"


def test_a_bug_is_one_line_and_a_traceback_only_on_request(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("longspan.cli.work.load", broken)
    code, out, err = cli("ask", "Who?", "--doc", "minutes.txt", "--json")
    assert (code, out) == (70, "")
    assert err == "longspan: internal error: RuntimeError: two lines (LONGSPAN_DEBUG=1 shows where)\n"
    monkeypatch.setenv("LONGSPAN_DEBUG", "1")
    code, out, err = cli("ask", "Who?", "--doc", "minutes.txt")
    assert code == 70
    assert "Traceback" in err


def test_bytes_that_are_no_text_in_the_question_do_no_harm(longspan) -> None:
    done = longspan("ask", os.fsdecode(b"Who \xff\xfe?"), *SHORT, "--doc", "minutes.txt", "--json")
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout.decode("utf-8"))


def test_a_full_disk_under_stdout_is_told(home: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command("attention", "--json"), stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 1
    assert done.stderr.decode().startswith("longspan: can't write the output: ")
    assert len(done.stderr.splitlines()) == 1
