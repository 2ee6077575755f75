"""`longspan eval`: what it prints, keeps and refuses."""

import json
from pathlib import Path

import pytest

SMALL = ("--lengths", "600", "--tokens", "8", "--greedy", "4", "--budgets", "1/2", "--mechanisms", "streaming quest")


def test_compare_prints_one_object_and_goes_on_where_it_was(cli, home: Path):
    pytest.importorskip("matplotlib")
    code, out, err = cli("eval", "compare", *SMALL, "--out", "found", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [row["mechanism"] for row in found["rows"]] == ["dense", "streaming", "quest"]
    assert found["device"] and found["command"].startswith("longspan eval compare")
    assert found["files"] == ["found/report.html", "found/compare-600.png"]
    assert Path(found["files"][1]).read_bytes()[:4] == b"\x89PNG" and "quest" in Path(found["files"][0]).read_text()
    lines = Path("found/rows.jsonl").read_text().splitlines()
    code, again, _ = cli("eval", "compare", *SMALL, "--out", "found", "--json")
    assert code == 0 and json.loads(again)["rows"] == found["rows"]
    assert len(Path("found/rows.jsonl").read_text().splitlines()) == len(lines) + 1  # where it ran, and no row


def test_compare_of_a_document_is_a_table(cli, home: Path):
    Path("long.txt").write_text("The harbour board met in May. " * 200)
    code, out, err = cli("eval", "compare", *SMALL, "--doc", "long.txt")
    assert code == 0, err
    assert "streaming" in out and "1/2" in out and "perplexity" in out


@pytest.mark.parametrize(
    "arguments,told",
    [
        (("--budgets", "2"), "no share"),
        (("--budgets", "1/0"), "no share"),
        (("--budgets", ","), "names no share"),
        (("--lengths", "many"), "no length"),
        (("--mechanisms", "nothing"), "unknown attention"),
        (("--mechanisms", "xattention"), "--prefill"),
        (("--greedy", "1"), "at least 2"),
        (("--prefill", "soon"), "unknown attention"),
        (("--doc", "minutes.txt"), "are needed"),
    ],
)
def test_what_can_not_be_compared_is_told_in_one_line(cli, home: Path, arguments, told):
    given = dict(zip(SMALL[::2], SMALL[1::2], strict=True)) | dict([arguments])
    code, out, err = cli("eval", "compare", *(word for pair in given.items() for word in pair))
    assert code != 0 and out == ""
    assert told in err.splitlines()[-1] and "Traceback" not in err
