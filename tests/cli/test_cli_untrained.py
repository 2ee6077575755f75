"""An attention that must be trained into a model says so, wherever it runs on one that was not: one line, once."""

import io
import json
from pathlib import Path

NOTE = "note: infini needs a model that was trained with it"


def test_ask_tells(cli, home: Path):
    asked = ("ask", "Who keeps the key?", "--doc", "minutes.txt", "--max-tokens", "3", "--attention")
    code, _, err = cli(*asked, "infini:segment=64")
    assert code == 0 and err.count(NOTE) == 1, err
    code, _, err = cli(*asked, "streaming")
    assert code == 0 and NOTE not in err
    code, out, _ = cli(*asked, "infini:segment=64", "--json")
    assert code == 0 and sum(NOTE.removeprefix("note: ") in note for note in json.loads(out)["notes"]) == 1


def test_chat_tells(cli, home: Path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Who keeps the key?\n/quit\n"))
    code, _, err = cli("chat", "--attention", "infini", "--max-tokens", "3")
    assert code == 0 and err.count(NOTE) == 1, err


def test_evals_tell(cli, home: Path, tiny_model: Path, capfdbinary):
    small = ("--lengths", "400", "--tokens", "4", "--greedy", "2", "--budgets", "1/2")
    code, out, err = cli("eval", "compare", *small, "--mechanisms", "infini streaming", "--json")
    assert code == 0 and err.count(NOTE) == 1, err
    rows = {row["mechanism"]: row for row in json.loads(out)["rows"]}
    assert rows["infini"]["options"] == "infini:segment=200" and rows["infini"]["keys"] == 200

    from longspan.evals import needle

    given = ["--model", str(tiny_model), "--device", "cpu", "--mechanisms", "infini:segment=64"]
    assert needle.main([*given, "--lengths", "1K", "--haystacks", "1", "--minutes", "1e-6"]) == 0
    assert capfdbinary.readouterr().err.decode().count(NOTE) == 1
