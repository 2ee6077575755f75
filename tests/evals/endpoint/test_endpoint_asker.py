"""Questions put to an endpoint: the same as to a model here, and its answers become the same rows."""

import re
import threading
from dataclasses import replace

import pytest

from endpoint_server import Server
from longspan.evals.asking import rows
from longspan.evals.asking.asker import Asker
from longspan.evals.asking.local import Local, template_of
from longspan.evals.asking.readers import reading
from longspan.evals.asking.run import Given, plan, run
from longspan.evals.endpoint.asker import Endpoint
from longspan.evals.endpoint.client import Client
from longspan.evals.journal import Journal
from longspan.evals.passkey import PASSKEY
from longspan.evals.questions.making import example
from longspan.evals.questions.readings import Retrieved, Summary
from longspan.hf.loading import load_tokenizer

GIVEN = Given(PASSKEY, ["passkey"], [400, 600], 3, 0)


def reads(prompt):
    """A model that finds pass keys."""
    return f" {re.search('pass key is ([0-9]+)', prompt)[1]}, I believe"


@pytest.fixture(scope="module")
def counter(folder):
    return load_tokenizer(str(folder))


def asker_of(server, counter, **options):
    client = Client(server.url, "", parallel=options.get("parallel", 1), timeout=60)
    return Endpoint(client, "scripted", counter, **options)


def asked_of(asker, given=GIVEN):
    with Journal(None) as journal:
        run(given, plan(given, lambda _: [asker]), journal, {}, lambda _: None)
        return [rows.row_of(entry) for entry in journal.entries]


def made(asker, length=400):
    return example(PASSKEY, "passkey", asker.tokens, length, 0, 0, template=asker.template)


def test_a_tokenizer_alone_counts_as_its_model_does(counter, tiny):
    text = "The harbour board met in May.\n\n Ω"
    assert counter.tokens(text) == tiny.tokens(text) and counter.tokenizer_hash == tiny.tokenizer_hash
    messages = [{"role": "user", "content": "Who?"}]
    assert counter.chat(messages) == tiny.chat(messages)


@pytest.mark.parametrize("raw", [False, True])
def test_questions_are_those_of_a_model_here(counter, tiny, make_llm, raw):
    with Server(reads) as server:
        asker = asker_of(server, counter, raw=raw)
        checked: Asker = asker
        assert asker.template == template_of(tiny) and not checked.measures
        here = plan(GIVEN, lambda _: [Local(make_llm("dense"))])
        there = plan(GIVEN, lambda _: [asker])
    same = ("eval", "task", "length", "seed", "question", "setup", "questions")
    for mine, other in zip(here, there, strict=True):
        assert all(getattr(mine.key, name) == getattr(other.key, name) for name in same)
        assert mine.key != other.key
    assert there[0].key.endpoint == server.url and there[0].key.mechanism == ("completions" if raw else "chat")


def test_a_chat_is_one_message_of_the_users(counter):
    with Server(reads) as server:
        asker = asker_of(server, counter)
        question = made(asker)
        reply = asker.ask(question, lambda _, __: None)
    (request,) = server.requests
    assert request.body["messages"] == [
        {"role": "user", "content": f"{question.context}{question.question} {question.answer_prefix}"}
    ]
    assert (request.body["max_tokens"], request.body["temperature"], request.body["model"]) == (16, 0, "scripted")
    words = len(request.prompt.split())
    assert reply.text == reads(request.prompt) and reply.error == ""
    assert reply.measures == {"prompt_tokens": words, "cached_tokens": words // 2, "completion_tokens": 4}
    assert reply.read_tokens == words and reply.decoded_tokens == 4 and reply.first_token_seconds > 0


def test_completions_go_on_from_the_answer_prefix(counter, tiny):
    with Server(reads) as server:
        asker = asker_of(server, counter, raw=True)
        question = made(asker)
        asker.ask(question, lambda _, __: None)
    (request,) = server.requests
    assert request.path == "/v1/completions" and "messages" not in request.body
    assert request.prompt.startswith("<|user|>") and request.prompt.endswith("<|end|><|assistant|>The pass key is")
    assert len(tiny.tokens(request.prompt)) + question.max_tokens == pytest.approx(question.tokens, abs=2)


@pytest.mark.parametrize("raw", [False, True])
def test_who_reads_rightly_scores_all_and_who_does_not_nothing(counter, raw):
    for answer, score in ((reads, 1.0), (lambda _: "no idea", 0.0)):
        with Server(answer) as server:
            found = asked_of(asker_of(server, counter, raw=raw))
        assert [row.score for row in found] == [score] * 6 and all(row.endpoint == server.url for row in found)
        assert all(row.measures["prompt_tokens"] > 50 and row.first_token_s >= 0 for row in found)


def test_what_is_too_long_is_a_row_with_its_reason(counter):
    with Server(reads, window=130) as server:
        found = asked_of(asker_of(server, counter))
    assert {(row.length, row.score, bool(row.error)) for row in found} == {(400, 1.0, False), (600, 0.0, True)}
    assert found[-1].error == "the context is too long: This model's maximum context length is 130 tokens."


def test_questions_are_asked_at_once(counter):
    with Server(reads) as server:
        barrier = threading.Barrier(3)
        server.gate = lambda: barrier.wait(60) and None
        found = asked_of(asker_of(server, counter, parallel=3))
    assert not barrier.broken and [row.score for row in found] == [1.0] * 6
    assert len({row.key for row in found}) == 6


def sums_up(prompt):
    """The same model, asked for summaries: it keeps what pass keys it sees."""
    found = re.search("pass key is ([0-9]+)", prompt)
    if "Sum up the text above" in prompt:
        return f"The pass key is {found[1]}." if found else "Grass is green."
    return found[1] if found else "no idea"


@pytest.mark.parametrize("context,requests", [(Retrieved(passages=2), 1), (Summary(chunk=150), 4)])
def test_contexts_are_read_in_part_by_several_at_once(counter, context, requests):
    with Server(sums_up) as server:
        asker = reading(asker_of(server, counter, parallel=3), context)
        found = asked_of(asker, replace(GIVEN, lengths=[600]))
    assert [row.score for row in found] == [1.0] * 3 and len(server.requests) >= 3 * requests
    whole = len(made(asker, 600).context.split())
    assert all(len(request.prompt.split()) < 0.7 * whole for request in server.requests)
