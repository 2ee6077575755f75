"""RULER through the real engine on a tiny model: what is read and asked, what a stopped run keeps, what is told."""

import json
import re
from dataclasses import replace

import pytest
import torch

from longspan.errors import UsageError
from longspan.evals.journal import Entry, Journal, read
from longspan.evals.ruler import rows
from longspan.evals.ruler.asking import ask, template_of
from longspan.evals.ruler.example import Template
from longspan.evals.ruler.passages import shipped
from longspan.evals.ruler.picture import picture
from longspan.evals.ruler.run import Given, plan, run
from longspan.evals.ruler.sources import Sources
from longspan.evals.ruler.tasks import after, example
from longspan.hf.loading import load, plain_transformers
from tiny_llama import save_model

SOURCES = Sources(essay=" ".join(shipped()[0].documents))
SPECS = (
    "dense",
    "streaming:window=100,sinks=2",
    "superlinear:window=80,spans=2",
    "quest:budget=256",
    "retrieval:pages=2,window=128",
    "retrieval:pages=2,window=128,read=place",
)


def made_for(model, task="niah_single_2", length=900, number=0):
    return example(task, model.tokens, length, number, 0, template=template_of(model), sources=SOURCES)


def test_the_prompt_is_the_models_template_and_nothing_of_ours(tiny):
    template = template_of(tiny)
    assert template == Template("<|user|>", "<|end|><|assistant|>")
    made = made_for(tiny)
    after_it = f"{made.question}<|end|><|assistant|>{made.answer_prefix}"
    assert after(made, template) == after_it
    whole = tiny.tokens("<|user|>") + tiny.tokens(made.context) + tiny.tokens(after_it)
    assert len(whole) + 128 == made.tokens <= 900


def test_a_model_without_a_template_gets_the_parts_alone(tmp_path):
    model = load(str(save_model(tmp_path / "bare", template=None)), device="cpu", dtype=torch.float32)
    assert template_of(model) == Template("", " ")


@pytest.mark.parametrize("task", ["niah_single_2", "niah_multikey_2", "qa_1"])
def test_answers_are_those_of_the_model_alone(tiny, make_llm, task):
    made = replace(made_for(tiny, task, 1000), max_tokens=12)
    made = replace(made, tokens=made.tokens - {"qa_1": 32}.get(task, 128) + 12)
    reply = ask(make_llm("dense"), made, template_of(tiny))
    model = plain_transformers(tiny)
    told = tiny.tokens("<|user|>") + tiny.tokens(made.context)
    assert reply.read_tokens == len(told) and reply.attention == "dense" and not reply.beyond
    told += tiny.tokens(f"{made.question}<|end|><|assistant|>{made.answer_prefix}")
    written = []
    with torch.inference_mode():
        while len(written) < 12:
            token = int(model(torch.tensor([told + written])).logits[0, -1].argmax())
            if token in tiny.end_tokens:
                break
            written.append(token)
    assert reply.text == tiny.decode(written) and (len(written) < 2 or reply.decoded_tokens == len(written))


def test_an_answer_ends_where_its_score_is_full(tiny, make_llm):
    made = made_for(tiny)
    whole = ask(make_llm("dense"), made, template_of(tiny)).text
    word = re.search("[a-z]{3}", whole)[0]
    found = replace(made, outputs=(word,))
    cut = ask(make_llm("dense"), found, template_of(tiny)).text
    assert whole.startswith(cut) and word in cut and len(cut) < len(whole) / 2


@pytest.mark.parametrize("spec", SPECS)
def test_every_way_of_attending_reads_and_gives_its_pages_back(tiny, make_llm, spec):
    llm, made = make_llm(spec), made_for(tiny, "niah_single_1")
    seen = []
    reply = ask(llm, made, template_of(tiny), lambda done, total: seen.append((done, total)))
    assert reply.attention == spec and reply.decoded_tokens > 0
    assert seen[-1] == (reply.read_tokens, reply.read_tokens) and seen[-1][0] > 600
    whole = reply.read_tokens * 3 * 2 * 2 * 8 * 4  # layers, keys and values, KV heads, head size, float32
    bounded = spec.startswith("streaming") or spec.endswith("window=128")
    assert 0 < reply.kept_bytes < whole / 2 if bounded else reply.kept_bytes >= whole
    assert llm.kv_budget.used == 0


def test_what_is_read_does_not_know_the_question(tiny, make_llm, monkeypatch):
    from longspan.engine.kv_context import KVContext

    extended, extend = [], KVContext.extend
    monkeypatch.setattr(
        KVContext, "extend", lambda self, tokens, *a: extended.append(list(tokens)) or extend(self, tokens, *a)
    )
    made = made_for(tiny)
    ask(make_llm("streaming:window=64"), made, template_of(tiny))
    (tokens,) = extended
    assert tokens == tiny.tokens("<|user|>") + tiny.tokens(made.context)


def test_memory_within_a_budget_serves_one_question_after_another(tiny, make_llm):
    llm = make_llm("streaming:window=64", kv_budget=600_000)
    for number in range(2):
        ask(llm, made_for(tiny, "qa_1", number=number), template_of(tiny))
        assert llm.kv_budget.used == 0


def test_positions_beyond_the_window_are_told_once(tiny, make_llm):
    llm, told = make_llm("dense"), []
    given = Given(["qa_1"], [1500], 2, 0, SOURCES)
    with Journal(None) as journal:
        run(llm, plan(llm, given), SOURCES, journal, {}, told.append)
    assert sum("beyond the 1024 tokens" in line for line in told) == 1 and len(told) == 3


# --- runs ---------------------------------------------------------------------------------------------------------

GIVEN = Given(["qa_1", "qa_2"], [900, 1000], 2, 5, SOURCES)


class Stop(Exception):
    pass


def test_a_run_that_was_stopped_goes_on(make_llm, tmp_path):
    llm, file = make_llm("streaming:window=64"), tmp_path / "ruler.jsonl"
    keys, told = plan(llm, GIVEN), []
    assert [(key.length, key.task, key.question) for key in keys][:3] == [
        (900, "qa_1", 0),
        (900, "qa_1", 1),
        (900, "qa_2", 0),
    ]

    def until_the_third(line):
        told.append(line)
        if line.startswith("[3/8]"):
            raise Stop

    with Journal(file) as journal, pytest.raises(Stop):
        run(llm, keys, SOURCES, journal, {"device": "one"}, until_the_third)
    first = file.read_bytes()
    with Journal(file) as journal:
        run(llm, keys, SOURCES, journal, {"device": "two"}, told.append)
        done = rows.answered(journal.entries)
    assert file.read_bytes().startswith(first)
    assert [line.split("]")[0] for line in told] == [f"[{i}/8" for i in range(1, 9)]
    assert re.match(r"\[2/8\] qa_1 900: \d+ % of 2, read at [\d,]+ tokens/s, about .* left$", told[1]) and told[
        -1
    ].endswith("about 0 s left")
    assert list(done) == keys
    assert [entry.environment["device"] for entry in done.values()] == ["one"] * 3 + ["two"] * 5
    with Journal(file) as journal:
        run(llm, keys, SOURCES, journal, {}, told.append)
    assert len(told) == 8, "nothing is asked twice"
    written = [entry.row for entry in read(file)]
    with Journal(None) as journal:
        run(llm, keys, SOURCES, journal, {}, lambda _: None)
    timed = ("read_tokens_per_s", "first_token_s", "decode_tokens_per_s")
    assert [{k: v for k, v in row.items() if k not in timed} for row in written] == [
        {k: v for k, v in json.loads(json.dumps(entry.row)).items() if k not in timed} for entry in journal.entries
    ]


def test_rows_tell_questions_and_settings_apart(make_llm):
    keys = set()
    for given, llm in (
        (GIVEN, make_llm("streaming:window=64")),
        (GIVEN, make_llm("streaming:window=65")),
        (GIVEN, make_llm()),
        (GIVEN, make_llm("quest", prefill="streaming:window=64")),
        (GIVEN, make_llm("streaming:window=64", kv_budget=10**7)),
        (replace(GIVEN, kv="fp16"), make_llm("streaming:window=64", kv="fp16")),
        (replace(GIVEN, seed=6), make_llm("streaming:window=64")),
        (replace(GIVEN, sources=Sources(essay="Quite another text. " * 99)), make_llm("streaming:window=64")),
    ):
        keys.update(plan(llm, given))
    assert len(keys) == 8 * 8


def row(task, length, score, **other):
    given = {"tokens": length, "depths": [], "score": score, "read_by": "dense", "answer": "", "wanted": ["x"]}
    given |= {"read_tokens_per_s": 1.0, "first_token_s": 1, "decode_tokens_per_s": 0.0, "kept_bytes": 4}
    key = rows.Key("q", "f", "float32", "dense", "", "auto", 0, task, length, 0, 0)
    return rows.Row(**{**key._asdict(), **given, **other})


def test_the_table_has_scores_and_intervals_by_task_and_length():
    found = rows.table([row("vt", 4096, 1.0), row("vt", 4096, 0.5), row("cwe", 4096, 0.0), row("vt", 8192, 0.0)])
    lines = [(line["task"], line["length"], line["questions"], line["score"]) for line in found]
    assert lines == [("vt", 4096, 2, 75.0), ("cwe", 4096, 1, 0.0), ("vt", 8192, 1, 0.0), ("average", 4096, 3, 37.5)]
    assert all(line["low"] <= line["score"] <= line["high"] for line in found)
    lengths, cells = rows.cells(found)
    assert [line.get("kept_bytes") for line in found] == [4, 4, 4, None]
    assert lengths == [4096, 8192] and [line[0] for line in cells] == ["vt", "cwe", "average"]
    assert cells[0] == ["vt", "75.0 (20 to 97)", "0.0 (0 to 79)"] and cells[1][2] == ""


@pytest.mark.parametrize("strange", [{"score": "1"}, {"wanted": "x"}, {"depths": None}, {"more": 1}])
def test_rows_of_another_eval_are_refused(strange):
    good = row("vt", 4096, 1.0).__dict__
    assert rows.answered([Entry(good, {})])
    with pytest.raises(UsageError, match="another eval"):
        rows.answered([Entry({**good, **strange}, {})])


@pytest.mark.parametrize("lengths", [(4096,), (4096, 8192, 16384)])
def test_the_picture_is_drawn(tmp_path, lengths):
    pytest.importorskip("matplotlib")
    lines = rows.table([row(task, length, 0.5) for task in ("vt", "cwe") for length in lengths])
    file = tmp_path / "ruler.png"
    picture(lines, "a tiny model", file)
    assert file.read_bytes().startswith(b"\x89PNG")
