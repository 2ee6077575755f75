"""`longspan eval report`: what it merges, prints, writes and refuses; every eval ends with the same."""

import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
ASKED = ("--lengths", "1K", "--tasks", "qa_1,qa_2", "--questions", "2")
TEXT = "The harbour board met in May. Nobody had asked for a lantern. " * 40


@pytest.fixture(scope="module")
def runs(tmp_path_factory, calibrated, tiny_model):
    """Two runs of RULER in folders of their own, by two mechanisms."""
    from longspan.cli import run

    home = tmp_path_factory.mktemp("runs")
    (home / "prose.txt").write_text(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LONGSPAN_CACHE", str(calibrated))
        patch.setenv("LONGSPAN_MODEL", str(tiny_model))
        patch.setenv("LONGSPAN_THREADS", "1")
        for name in ("streaming", "sparse"):
            given = ("--attention", name, "--haystack", str(home / "prose.txt"), "--out", str(home / name), "--json")
            assert run(("eval", "ruler", *ASKED, *given)) == 0
    return home


def test_a_run_leaves_its_report(runs):
    names = {file.name for file in (runs / "sparse").iterdir()}
    assert names == {"ruler.jsonl", "report.html", "ruler-length.png", "ruler-needles.png"}
    assert "streaming" not in (runs / "sparse" / "report.html").read_text()


def test_runs_are_merged_into_one_table_and_page(cli, runs):
    folders = (str(runs / "streaming"), str(runs / "sparse"))
    code, out, err = cli("eval", "report", *folders, folders[0])
    assert code == 0, err
    assert "RULER, average of 2 tasks" in out and "1,024 tokens" in out and " to " in out
    assert out.index("streaming") < out.index("sparse")
    assert "note: 4 rows answer a question that another row answered before" in err
    assert err.splitlines()[-1].startswith("picture: report/ruler-") and "report: report/report.html" in err
    page = Path("report/report.html").read_text()
    assert "streaming" in page and "sparse" in page and "Points above streaming" in page


def test_one_object_is_printed(cli, runs):
    code, out, err = cli("eval", "report", str(runs / "sparse" / "ruler.jsonl"), "--out", "here", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [(line["task"], line["questions"]) for line in found["scores"]] == [("qa_1", 2), ("qa_2", 2), ("average", 4)]
    assert all(line["low"] <= line["score"] <= line["high"] for line in found["scores"])
    assert found["scores"][0]["how"] == "sparse" and found["scores"][0]["kept_bytes"] > 0
    assert found["environment"]["torch"] and found["differences"] == [] and found["notes"] == []
    assert found["files"][0] == "here/report.html" and all(Path(file).is_file() for file in found["files"])


def test_a_run_alone_shows_its_tasks_and_keeps_the_report_beside_it(cli, runs):
    (runs / "sparse" / "report.html").unlink()
    code, out, err = cli("eval", "report", str(runs / "sparse" / "ruler.jsonl"))
    assert code == 0, err
    assert "RULER, sparse: score in percent" in out, "several evals may stand below one another"
    assert [line.split()[0] for line in out.splitlines()[4:7]] == ["qa_1", "qa_2", "average"]
    assert (runs / "sparse" / "report.html").is_file() and f"report: {runs / 'sparse' / 'report.html'}" in err


@pytest.mark.parametrize(
    "arguments,told",
    [
        ((), "Missing argument"),
        (("gone.jsonl",), "can't read gone.jsonl"),
        (("minutes.txt",), "minutes.txt is no journal"),
        ((".",), "holds no journal"),
        (("empty.jsonl",), "no answers in empty.jsonl"),
        (("strange.jsonl",), "no row here is of an eval"),
        (("{runs}/sparse", "--out", "minutes.txt"), "can't make minutes.txt"),
        (("{runs}/sparse", "--out", "minutes.txt/report"), "can't make minutes.txt/report"),
    ],
)
def test_what_can_not_be_reported_is_told_in_one_line(cli, runs, home, arguments, told):
    if "empty.jsonl" in arguments or "strange.jsonl" in arguments:
        Path("empty.jsonl").write_text("")
        Path("strange.jsonl").write_text('{"environment": {}}\n{"x": 1}\n')
    code, out, err = cli("eval", "report", *(word.format(runs=runs) for word in arguments))
    assert code != 0 and out == ""
    assert told in err.splitlines()[-1] and "Traceback" not in err and "internal error" not in err
