"""`longspan eval ruler` and the other evals of generated questions: what they print, keep and refuse."""

import json
from pathlib import Path

import pytest

SMALL = ("--lengths", "1K", "--tasks", "qa_1,qa_2", "--questions", "2", "--attention", "streaming:window=64")
TEXT = "The harbour board met in May. Nobody had asked for a lantern. " * 40


@pytest.fixture
def haystack(home: Path):
    """A text of the user's, which is read in no time."""
    Path("prose.txt").write_text(TEXT)
    return ("--haystack", "prose.txt")


def test_one_object_is_printed_and_a_second_run_asks_nothing(cli, haystack):
    pytest.importorskip("matplotlib")
    code, out, err = cli("eval", "ruler", *SMALL, *haystack, "--out", "found", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [(line["task"], line["length"], line["questions"]) for line in found["table"]] == [
        ("qa_1", 1024, 2),
        ("qa_2", 1024, 2),
        ("average", 1024, 4),
    ]
    assert len(found["rows"]) == 4 and all(500 < row["tokens"] <= 1024 for row in found["rows"])
    assert (
        found["seed"] == 0
        and found["rows"][0]["attention"] == "streaming:window=64"
        and found["torch"]
        and found["command"]
    )
    assert [Path(name).name for name in found["files"]] == ["report.html", "ruler-length.png", "ruler-needles.png"]
    assert Path(found["files"][1]).read_bytes()[:4] == b"\x89PNG"
    assert "[4/4] qa_2 1024: " in err and "tokens/s, about 0 s left" in err
    kept = Path("found/ruler.jsonl").read_bytes()
    code, again, err = cli("eval", "ruler", *SMALL, *haystack, "--out", "found", "--json")
    assert code == 0 and json.loads(again)["rows"] == found["rows"] and "[4/4]" not in err
    assert Path("found/ruler.jsonl").read_bytes() == kept


def test_the_table_names_tasks_lengths_and_intervals(cli, haystack, tmp_path):
    file = tmp_path / "squad.json"
    paragraph = {"context": "The lamp is red.", "qas": [{"question": "Which colour?", "answers": [{"text": "red"}]}]}
    file.write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}))
    given = ("--lengths", "900,1K", "--tasks", "qa_1", "--questions", "1", "--attention", "streaming:window=64")
    code, out, err = cli("eval", "ruler", *given, *haystack, "--qa", str(file))
    assert code == 0, err
    assert "900 tokens" in out and "1,024 tokens" in out and "qa_1" in out and " to " in out and "average" not in out
    assert "95 % intervals; 1 question of" in err


def test_ctrl_c_says_how_to_go_on(cli, haystack, monkeypatch):
    from longspan.evals.asking.local import Local

    asked, ask = [], Local.ask

    def interrupted(*arguments):
        asked.append(1)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return ask(*arguments)

    monkeypatch.setattr(Local, "ask", interrupted)
    code, out, err = cli("eval", "ruler", *SMALL, *haystack, "--out", "found")
    assert (code, out) == (130, "") and err.splitlines()[-1].endswith("the same command goes on from found")
    monkeypatch.setattr(Local, "ask", ask)
    code, _, err = cli("eval", "ruler", *SMALL, *haystack, "--out", "found")
    assert code == 0 and "[1/4]" not in err and "[2/4]" in err


@pytest.mark.parametrize(
    "arguments,told",
    [
        (("--tasks", "vt,nothing"), "unknown task 'nothing'"),
        (("--tasks", ","), "no task is named"),
        (("--lengths", "many"), "no length"),
        (("--lengths", "100"), "100 tokens do not hold a question of qa_1"),
        (("--questions", "0"), "--questions 0"),
        (("--attention", "nothing"), "unknown attention"),
        (("--prefill", "soon"), "unknown attention"),
        (("--kv", "int0"), "int0"),
        (("--kv-budget", "much"), "no size"),
        (("--haystack", "gone.txt"), "gone.txt"),
        (("--haystack", "minutes.txt"), "words: give at least"),
        (("--qa", "gone.json"), "can't read gone.json"),
        (("--qa", "minutes.txt"), "no JSON"),
        (("--out", "minutes.txt"), "minutes.txt"),
        (("--question", "never"), "--question 'never' is none of"),
        (("--order", "middle"), "--order 'middle' is none of"),
        (("--context", "half"), "--context 'half' is none of"),
        (("--mechanisms", "dense"), "give one of the two"),
        (("--budgets", "2"), "no share"),
        (("--minutes", "0"), "--minutes 0"),
        (("--shard", "3/2"), "no part"),
        (("--dtype", "int8"), "use one of float32"),
        (("--model", "nosuchmodel"), "nosuchmodel"),
    ],
)
def test_what_can_not_be_asked_is_told_in_one_line(cli, haystack, arguments, told):
    given = dict(zip(SMALL[::2], SMALL[1::2], strict=True)) | dict([haystack]) | dict([arguments])
    code, out, err = cli("eval", "ruler", *(word for pair in given.items() for word in pair))
    assert code != 0 and out == ""
    assert told in err.splitlines()[-1] and "Traceback" not in err and "internal error" not in err


def test_rows_of_another_eval_are_refused_before_a_model_is_loaded(cli, haystack, monkeypatch):
    from longspan.cli import work

    monkeypatch.setattr(work, "load", None)
    Path("found").mkdir()
    Path("found/ruler.jsonl").write_text('{"environment": {}}\n{"score": 1}\n')
    code, out, err = cli("eval", "ruler", *SMALL, *haystack, "--out", "found")
    assert (code, out) == (2, "") and "rows of another eval" in err


def test_several_mechanisms_at_a_share_are_asked_the_same(cli, haystack):
    given = ("--lengths", "900", "--tasks", "qa_1", "--questions", "2", "--budgets", "1/4", *haystack)
    code, out, err = cli("eval", "ruler", *given, "--mechanisms", "dense streaming quest:who=layer", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [line["contender"] for line in found["table"]] == ["dense", "streaming at 1/4", "quest:who=layer at 1/4"]
    (_, streaming, quest), questions = found["rows"][:3], {row["questions"] for row in found["rows"]}
    assert len(questions) == 1 and streaming["mechanism"] == "streaming" and quest["budget"] == "1/4"
    assert streaming["attention"] != "streaming" and "budget=225" in quest["attention"]
    code, _, err = cli("eval", "ruler", *given)
    assert code == 2 and "name one with --attention" in err


def test_shards_ask_each_question_once_and_see_one_another(cli, haystack):
    pytest.importorskip("matplotlib")
    code, _, err = cli("eval", "ruler", *SMALL, *haystack, "--out", "found", "--shard", "1/2", "--json")
    assert code == 0 and "[2/2]" in err
    code, out, err = cli("eval", "ruler", *SMALL, *haystack, "--out", "found", "--shard", "2/2", "--json")
    assert code == 0 and len(json.loads(out)["rows"]) == 4
    assert sorted(file.name for file in Path("found").glob("*.jsonl")) == ["ruler-1of2.jsonl", "ruler-2of2.jsonl"]
    code, out, err = cli("eval", "ruler", *SMALL, *haystack, "--out", "found", "--json")
    assert code == 0 and len(json.loads(out)["rows"]) == 4 and "[4/4]" not in err


def test_a_run_without_time_left_says_what_is_left(cli, haystack):
    code, out, err = cli("eval", "ruler", *SMALL, *haystack, "--minutes", "1e-9")
    assert code == 0 and "3 of 4 questions left: nothing is kept without --out FOLDER" in err and "qa_1" in out


@pytest.mark.parametrize(
    "name, more",
    [
        ("passkey", ()),
        ("needle", ("--depths", "2", "--kinds", "single,multikey")),
        ("mrcr", ("--tasks", "mrcr_2")),
        ("nolima", ("--tasks", "onehop", "--question", "before")),
        ("rot", ("--tasks", "coherent_1", "--order", "last")),
        ("rot", ("--tasks", "shuffled_0", "--context", "retrieved")),
        ("perplexity", ()),
    ],
)
def test_every_eval_asks(cli, haystack, name, more):
    given = ("eval", name, "--lengths", "1600,1800", "--questions", "1", "--attention", "streaming:window=64")
    code, out, err = cli(*given, *haystack, *more, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert len(found["rows"]) == (8 if name == "needle" else 2) and {row["eval"] for row in found["rows"]} == {name}
    assert all(
        0 <= row["score"] <= 1 and row["seconds"] > 0 and row["tokens"] <= row["length"] for row in found["rows"]
    )


def test_perplexities_are_kept_and_told(cli, haystack):
    pytest.importorskip("matplotlib")
    given = ("eval", "perplexity", "--lengths", "400,600", "--questions", "2", "--attention", "streaming:window=64")
    code, out, err = cli(*given, *haystack, "--out", "found", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [line["perplexity"] > 1 for line in found["table"]] == [True, True]
    code, out, err = cli(*given, *haystack, "--out", "found")
    assert code == 0 and "400 tokens" in out and "perplexities" in err and "[4/4]" not in err


@pytest.mark.parametrize(
    "arguments,told",
    [
        (("needle", "--kinds", "double"), "unknown kind 'double'"),
        (("needle", "--depths", "1"), "--depths 1 is no grid"),
        (("mrcr", "--order", "first"), "--order first changes what is right in mrcr_2"),
        (("perplexity", "--question", "before"), "--question is for tasks that ask one"),
        (("perplexity", "--attention", "retrieval"), "gives no probability of a text"),
        (("passkey", "--tasks", "vt"), "unknown task 'vt'"),
    ],
)
def test_what_an_eval_can_not_ask_is_told_in_one_line(cli, haystack, arguments, told):
    code, out, err = cli("eval", *arguments, *haystack)
    assert code == 2 and out == "" and told in err.splitlines()[-1]


def test_how_far_it_is_is_told_in_the_evals_own_measure(cli, haystack):
    given = ("--lengths", "600", "--questions", "1", "--attention", "streaming:window=64", *haystack)
    code, _, err = cli("eval", "perplexity", *given)
    assert code == 0 and "[1/1] text 600: perplexity " in err and " of 1, read at " in err
    code, _, err = cli("eval", "passkey", *given)
    assert code == 0 and ("[1/1] passkey 600: 0 % of 1" in err or "[1/1] passkey 600: 100 % of 1" in err)
