"""Questions through the real engine on a tiny model: what is read and asked, and that it is the model's own answer."""

import math
import re
from dataclasses import replace

import pytest
import torch

from longspan.errors import UsageError
from longspan.evals.asking.local import Local, template_of
from longspan.evals.questions.example import Template
from longspan.evals.questions.making import example
from longspan.evals.questions.passages import shipped
from longspan.evals.questions.setup import Setup
from longspan.evals.questions.sources import Sources
from longspan.evals.ruler.tasks import RULER
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


def made_for(model, task="niah_single_2", length=900, number=0, **setup):
    return example(
        RULER, task, model.tokens, length, number, 0, template=template_of(model), sources=SOURCES, setup=Setup(**setup)
    )


def test_the_prompt_is_the_models_template_and_nothing_of_ours(tiny):
    template = template_of(tiny)
    assert template == Template("<|user|>", "<|end|><|assistant|>")
    made = made_for(tiny)
    after_it = f"{made.question}<|end|><|assistant|>{made.answer_prefix}"
    assert made.closing == after_it
    whole = tiny.tokens("<|user|>") + tiny.tokens(made.context) + tiny.tokens(after_it)
    assert len(whole) + 128 == made.tokens <= 900


def test_a_model_without_a_template_gets_the_parts_alone(tmp_path):
    model = load(str(save_model(tmp_path / "bare", template=None)), device="cpu", dtype=torch.float32)
    assert template_of(model) == Template("", " ")


@pytest.mark.parametrize("task", ["niah_single_2", "niah_multikey_2", "qa_1"])
def test_answers_are_those_of_the_model_alone(tiny, make_llm, task):
    made = replace(made_for(tiny, task, 1000), max_tokens=12)
    made = replace(made, tokens=made.tokens - {"qa_1": 32}.get(task, 128) + 12)
    reply = Local(make_llm("dense")).ask(made)
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
    whole = Local(make_llm("dense")).ask(made).text
    word = re.search("[a-z]{3}", whole)[0]
    found = replace(made, outputs=(word,))
    cut = Local(make_llm("dense")).ask(found).text
    assert whole.startswith(cut) and word in cut and len(cut) < len(whole) / 2


@pytest.mark.parametrize("spec", SPECS)
def test_every_way_of_attending_reads_and_gives_its_pages_back(tiny, make_llm, spec):
    llm, made = make_llm(spec), made_for(tiny, "niah_single_1")
    seen = []
    reply = Local(llm).ask(made, lambda done, total: seen.append((done, total)))
    assert reply.attention == spec and reply.decoded_tokens > 0
    assert seen[-1] == (reply.read_tokens, reply.read_tokens) and seen[-1][0] > 600
    whole = reply.read_tokens * 3 * 2 * 2 * 8 * 4  # layers, keys and values, KV heads, head size, float32
    bounded = spec.startswith("streaming") or spec.endswith("window=128")
    assert 0 < reply.kept_bytes < whole / 2 if bounded else reply.kept_bytes >= whole
    assert llm.kv_budget.used == 0


def brief(made, tokens=14):
    """Return a question whose answer may take fewer tokens."""
    return replace(made, max_tokens=tokens, tokens=made.tokens - made.max_tokens + tokens)


@pytest.mark.parametrize("spec", [*SPECS, "expected:budget=200,heads=adaptive", "rocketkv:budget=200"])
def test_answers_that_are_written_together_are_those_of_each_alone(tiny, make_llm, spec):
    asker = Local(make_llm(spec), together=4)
    questions = [brief(made_for(tiny, task, 640)) for task in ("niah_single_1", "qa_1")]
    alone = [asker.ask(made) for made in questions]
    assert len(alone[1].text) > 8
    # One ends as soon as its score is full, while the other goes on.
    questions[0] = replace(questions[0], outputs=(re.search("[A-Za-z]", alone[0].text)[0],))
    alone[0] = asker.ask(questions[0])
    together = asker.ask_all(questions)
    assert together[0].decoded_tokens < together[1].decoded_tokens
    for one, other in zip(alone, together, strict=True):
        assert (one.text, one.decoded_tokens, one.kept_bytes) == (other.text, other.decoded_tokens, other.kept_bytes)
        assert (one.attention, one.read_tokens, one.beyond) == (other.attention, other.read_tokens, other.beyond)
        assert other.measures == {"together": 2} and other.first_token_seconds > 0
    assert asker.llm.kv_budget.used == 0


def test_answers_are_written_together_as_far_as_bytes_allow(tiny, make_llm):
    questions = [brief(made_for(tiny, "qa_1", 640, number=i), 3) for i in range(3)]
    each = questions[0].tokens * 3 * 2 * 2 * 8 * 4
    replies = Local(make_llm("dense"), stacked=3 * each // 2).ask_all(questions)
    assert [reply.measures.get("together", 1) for reply in replies] == [2, 2, 1]
    assert Local(make_llm("dense")).together == 1, "a CPU writes one by one"
    assert Local(make_llm("streaming", kv_budget=10**6), together=8).together == 1


def test_what_is_read_does_not_know_the_question(tiny, make_llm, monkeypatch):
    from longspan.engine.kv_context import KVContext

    extended, extend = [], KVContext.extend
    monkeypatch.setattr(
        KVContext, "extend", lambda self, tokens, *a: extended.append(list(tokens)) or extend(self, tokens, *a)
    )
    made = made_for(tiny)
    Local(make_llm("streaming:window=64")).ask(made)
    (tokens,) = extended
    assert tokens == tiny.tokens("<|user|>") + tiny.tokens(made.context)


def test_memory_within_a_budget_serves_one_question_after_another(tiny, make_llm):
    llm = make_llm("streaming:window=64", kv_budget=600_000)
    for number in range(2):
        Local(llm).ask(made_for(tiny, "qa_1", number=number))
        assert llm.kv_budget.used == 0


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec != SPECS[4]])
def test_the_probability_of_a_text_is_the_models(tiny, make_llm, spec):
    made = replace(made_for(tiny), follows=" The grass is green. The sky is blue.", template=Template("", ""))
    tokens = [*tiny.tokens(made.context), *tiny.tokens(made.follows)]
    asker = Local(make_llm(spec))
    assert asker.measures
    reply = asker.ask(replace(made, tokens=len(tokens)))
    assert reply.text == "" and 0 < reply.nll < 2 * math.log(320)
    if spec == "dense":
        with torch.inference_mode():
            logits = plain_transformers(tiny)(torch.tensor([tokens])).logits[0].float()
        count = len(tiny.tokens(made.follows)) - 1
        wanted = logits.log_softmax(-1)[-count - 1 : -1].gather(1, torch.tensor(tokens[-count:])[:, None])
        assert reply.nll == pytest.approx(-float(wanted.mean()), rel=1e-4)


def test_an_index_alone_gives_no_probability(tiny, make_llm):
    asker = Local(make_llm(SPECS[4]))
    assert not asker.measures
    with pytest.raises(UsageError, match="read=place"):
        asker.ask(replace(made_for(tiny), follows=" The end.", template=Template("", "")))


@pytest.mark.parametrize("place", ["before", "both"])
@pytest.mark.parametrize("spec", ["dense", SPECS[4]])
def test_a_question_that_stands_before_is_read_before(tiny, make_llm, monkeypatch, spec, place):
    from longspan.engine.kv_context import KVContext

    steps, step = [], KVContext.step
    monkeypatch.setattr(KVContext, "step", lambda self, tokens: steps.append(list(tokens)) or step(self, tokens))
    made = made_for(tiny, question=place)
    assert made.context.startswith(f"{made.question}\n\n") and made.head.startswith(made.question)
    assert made.asked == ("" if place == "before" else made.question) and made.tokens <= 900
    reply = Local(make_llm(spec)).ask(made)
    assert reply.decoded_tokens > 0
    if spec == "dense":
        assert steps[0] == tiny.tokens(made.asked + "<|end|><|assistant|>" + made.answer_prefix)


def test_who_answers_is_told_apart(tiny, make_llm):
    asker = Local(make_llm("quest:budget=512"), mechanism="quest", budget="1/4")
    told = asker.identity
    assert (told.mechanism, told.budget, told.attention) == ("quest", "1/4", "quest:budget=512")
    assert (told.fingerprint, told.dtype, told.kv, told.kv_budget, told.endpoint) == (
        tiny.fingerprint, "float32", "auto", 0, "",
    )  # fmt: skip
    assert Local(make_llm()).identity.mechanism == "auto" and asker.counted_by == tiny.tokenizer_hash
