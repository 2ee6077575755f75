"""RULER's questions of an independent generator against ours: counts, lengths, forms of answers, and scores alike."""

import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from longspan.evals.questions.making import examples
from longspan.evals.questions.scoring import score
from longspan.evals.ruler.tasks import RULER

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import ruler_agreement, ruler_independent
from benchmarks.ruler_independent import TASKS, Maker, Question

NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for (\S+) is: (\S+)\.")


def words_of(made: Question):
    return sum(len(text.split()) for text in (made.context, f"{made.asked} {made.prefix}"))


def theirs(task, length, count=4):
    return [Maker(words_of, lambda text: len(text.split()), random.Random(i)).made(task, length) for i in range(count)]


def ours(task, length, count=4):
    return examples(RULER, task, str.split, length, count, 3)


def form(text):
    """Return a text's form: letters and digits without what they say."""
    return re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[A-Z]+|[a-z]+|\d", lambda m: kind(m[0]), text)


def kind(found):
    if len(found) == 36:
        return "U"
    return "9" if found.isdigit() else "a" if found.islower() else "A"


def counted(task, context):
    """Return what of a context can be counted, whoever made it."""
    if task.startswith("niah"):
        found = NEEDLE.findall(context)
        lines = Counter(NEEDLE.sub("", context).splitlines())
        return {
            "needles": min(len(found), 20), "values a key": max(Counter(key for _, key, _ in found).values()),
            "kinds": {what for what, _, _ in found}, "forms": {(form(key), form(value)) for _, key, value in found},
            "noise": lines.most_common(1)[0][0] if lines.most_common(1)[0][1] > 9 else "",
        }  # fmt: skip
    if task == "vt":
        steps = re.findall(r"^VAR ([A-Z]+) = (VAR )?(\w+)$", context, re.MULTILINE)
        return {
            "steps": len(steps),
            "names": {len(name) for name, _, _ in steps},
            "first": [not v for _, v, _ in steps],
        }
    if task == "cwe":
        lists = context.split("Below is a numbered list")[1:]
        counts = [Counter(Counter(re.findall(r"\d+\. (\S+)", part.split("Question")[0])).values()) for part in lists]
        return {"times": [set(each) for each in counts], "common": [each[max(each)] for each in counts]}
    if task == "fwe":
        ranked = Counter(re.findall(r"(?<= )(?:[a-z]{6}|\.\.\.)(?= |\n)", context.split("ones.")[1])).most_common()
        return {
            "noise": ranked[0][0],
            "falls": [round(ranked[0][1] / ranked[i][1] / (i + 1) ** 2, 1) for i in range(4)],
        }
    return {"numbered": re.findall(r"^Document (\d+):$", context, re.MULTILINE)[:3]}


@pytest.mark.parametrize("length", [2048, 4096])
@pytest.mark.parametrize("task", TASKS)
def test_two_generators_agree_on_counts_and_lengths(task, length):
    one, other = theirs(task, length), ours(task, length)
    assert [counted(task, made.context) for made in one] == [counted(task, made.context) for made in other]
    sizes = [words_of(made) + made.max_tokens for made in one], [made.tokens for made in other]
    assert all(length - 130 < size <= length for side in sizes for size in side)
    assert abs(sum(sizes[0]) - sum(sizes[1])) / 4 < 80, "as full as one another"


@pytest.mark.parametrize("task", TASKS)
def test_two_generators_agree_on_what_is_asked_and_how_it_is_scored(task):
    for one, other in zip(theirs(task, 3000), ours(task, 3000), strict=True):
        assert one.max_tokens == other.max_tokens and one.any_counts == (other.scoring == "any")
        if not task.startswith("qa"):
            assert len(one.answers) == len(other.outputs)
            assert {form(each) for each in one.answers} == {form(each) for each in other.outputs}
            assert form(one.asked) == form(other.question) and form(one.prefix) == form(other.answer_prefix)
        assert all(answer in one.context for answer in one.answers[:1]) and one.answers[0] in one.context
        for said in ("", one.answers[0].upper(), " ".join(one.answers), "x".join(one.answers[:3])):
            assert one.score(said) == score(said, one.answers, other.scoring)


def test_needles_stand_everywhere_in_both():
    for make in (theirs, ours):
        places = []
        for made in make("niah_single_1", 1500, 40):
            places.append(NEEDLE.search(made.context).start() / len(made.context))
        assert sum(place < 0.5 for place in places) in range(10, 31) and max(places) - min(places) > 0.75


def test_nothing_of_the_evals_is_imported_by_the_independent_one():
    assert not re.search(r"^\s*(from|import) longspan", Path(ruler_independent.__file__).read_text(), re.MULTILINE)


def test_the_scores_of_both_are_held_against_one_another(folder, places, one_thread, tmp_path, capsys, monkeypatch):
    from benchmarks import ruler

    shared = ["--model", str(folder), "--device", "cpu", "--lengths", "1000"]
    file = tmp_path / "found" / "agreement.jsonl"
    told = ["--out", str(file), *shared, "--questions", "2"]
    monkeypatch.setattr(ruler_independent, "TASKS", ("qa_1", "niah_single_1"))
    assert ruler_agreement.main(told) == 0 and ruler_agreement.main(told) == 0
    assert len(file.read_text().splitlines()) == 6, "two runs, and each question once"
    given = ["--out", str(tmp_path / "found"), *shared, "--tasks", "qa_1,niah_single_1", "--mechanisms", ""]
    ruler.work(ruler._options([*given, "--questions", "2", "--shard", "1/1"]))
    ruler.merge(ruler._options(given))
    capsys.readouterr()
    assert ruler_agreement.main([*told, "--result", "--ours", str(tmp_path / "found/ruler.jsonl")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [line["task"] for line in found["table"]] == ["qa_1", "niah_single_1", "average"]
    assert all(line["agrees"] and line["questions"] == 2 for line in found["table"]), "a tiny model knows nothing"
    assert len(found["rows"]) == 4 and "answer" not in found["rows"][0]


def test_scores_that_differ_by_more_than_chance_are_told():
    line = ruler_agreement._line("vt", 2048, [1.0] * 9 + [0.0], [0.0] * 9 + [1.0])
    assert line["difference"] == 80.0 and not line["agrees"]
    assert ruler_agreement._line("vt", 2048, [1.0, 0.0] * 5, [1.0, 0.0] * 5)["agrees"]
    assert 12 < ruler_agreement._line("vt", 2048, [1.0] * 10, [1.0] * 10)["error"] < 13, "ten alike prove little"
    assert ruler_agreement._line("cwe", 2048, [0.1, 0.2] * 5, [0.1, 0.2] * 5)["error"] < 3
