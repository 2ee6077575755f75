"""`when=question`: documents stay whole, each question evicts on a copy of its own."""

import pytest
import torch

from longspan import LLM
from longspan.attention import parse
from longspan.engine.kv_context import KVContext
from longspan.errors import PoolExhaustedError, UsageError
from longspan.evals.haystack import prose
from longspan.hf.loading import load
from longspan.kv.budget import Budget
from longspan.kv.tiers import TierLimits, Tiers
from longspan.retrieval.heads import RetrievalHeads
from tiny_hybrid import save_hybrid
from tiny_llama import WINDOW

HEADS = RetrievalHeads(((1, 0), (2, 1), (2, 3)))
SPECS = [
    "h2o:budget=150,window=70,every=64",
    "snapkv:budget=150",
    "snapkv:budget=150,heads=adaptive",
    "rocketkv:budget=150",
    "expected:budget=150,future=64",
    "keydiff:budget=150,every=128",
]


@pytest.fixture(scope="module")
def tokens(tiny):
    return tiny.tokens(prose()[:30000])


def read(model, spec, tokens, **options):
    context = KVContext(model, parse(spec), **options)
    context.extend(tokens)
    return context


def rows(layers):
    return [group.positions().tolist() for kv in layers for group in kv.groups]


@pytest.mark.parametrize("spec", SPECS)
def test_a_question_evicts_on_a_copy_and_leaves_the_document_whole(tiny, tokens, spec):
    context, dense = read(tiny, f"{spec},when=question", tokens[:700]), read(tiny, "dense", tokens[:700])
    mechanism = context.mechanism
    whole, nbytes = rows(context.kept.layers), context.nbytes
    assert all(head == list(range(700)) for group in whole for head in group)
    said = []
    for _ in range(2):
        # The question itself is read with everything in sight; what is left for the answer is the budget.
        torch.testing.assert_close(context.step(tokens[700:740]), dense.step(tokens[700:740]), atol=2e-3, rtol=1e-3)
        copy = context._asked.layers
        for kv in copy.layers:
            assert kv.total == mechanism.keeps(740) * kv.kv_heads
            for group in kv.groups:
                newest = torch.arange(700, 740)
                assert (group.positions()[:, -40:] == newest).all(), "a question's own tokens stay"
        assert context.nbytes > nbytes and rows(context.kept.layers) == whole
        said.append(context.step(tokens[740:741]))
        context.truncate(700)
        dense.truncate(700)
        assert context.nbytes == nbytes and rows(context.kept.layers) == whole
    assert torch.equal(said[0], said[1])


def test_the_copy_is_what_the_paper_makes_of_a_prompt_that_ends_in_its_question(tiny, tokens):
    context = read(tiny, "snapkv:budget=150,when=question", tokens[:700])
    context.step(tokens[700:740])
    paper = read(tiny, "snapkv:budget=150,window=40", tokens[:740])
    assert rows(context._asked.layers.layers) == rows(paper.kept.layers)
    for token in tokens[740:744]:
        torch.testing.assert_close(context.step([token]), paper.step([token]), atol=2e-3, rtol=1e-3)


def test_two_questions_keep_different_rows(tiny, tokens):
    context, kept = read(tiny, "snapkv:budget=100,when=question", tokens[:800]), []
    for question in (tokens[900:940], tokens[1200:1240]):
        context.step(question)
        kept.append(rows(context._asked.layers.layers))
        context.truncate(800)
    assert kept[0] != kept[1]


def test_cut_within_a_question_or_read_on_from_an_answer_it_is_as_if_never_asked(tiny, tokens):
    spec = "snapkv:budget=150,when=question"
    context, other = read(tiny, spec, tokens[:500]), read(tiny, spec, tokens[:500])
    context.step(tokens[500:560])
    context.truncate(530)
    other.step(tokens[500:530])
    assert context.length == 530
    torch.testing.assert_close(context.step(tokens[0:1]), other.step(tokens[0:1]), atol=1e-4, rtol=1e-4)
    context.truncate(500)
    context.step(tokens[500:560])
    context.extend(tokens[560:600])
    straight = read(tiny, spec, tokens[:600])
    assert context.tokens == straight.tokens and rows(context.kept.layers) == rows(straight.kept.layers)
    torch.testing.assert_close(context.step(tokens[7:30]), straight.step(tokens[7:30]), atol=2e-3, rtol=1e-3)


def test_forks_ask_apart_and_saved_contexts_are_whole(tiny, tokens):
    context = read(tiny, "snapkv:budget=150,when=question", tokens[:600])
    context.step(tokens[600:640])
    other = context.fork()
    torch.testing.assert_close(other.step(tokens[1:2]), context.step(tokens[1:2]))
    other.truncate(600)
    assert context.length == 641 and other.nbytes < context.nbytes
    context.truncate(600)
    restored = KVContext(tiny, context.mechanism)
    restored.restore(tokens[:600], {name: tensor.clone() for name, tensor in context.tensors().items()})
    for each in (context, restored):
        each.step(tokens[600:640])
    torch.testing.assert_close(restored.step(tokens[1:2]), context.step(tokens[1:2]))


@pytest.mark.parametrize("spec", SPECS[:4])
def test_beyond_the_window_and_within_bytes_as_much_of_the_document_stays_as_fits(tiny, tokens, spec):
    context = read(tiny, f"{spec},when=question", tokens[:2500])
    assert WINDOW // 2 < context.kept.held <= WINDOW
    context.step(tokens[2500:2530])
    assert all(kv.total <= context.mechanism.keeps(2530) * kv.kv_heads for kv in context._asked.layers.layers)
    root = Budget(3 * 12 * 8192, "KV")
    small = KVContext(tiny, parse(f"{spec.replace('150', '80').replace('70', '30')},when=question"), budget=root)
    small.extend(tokens[:1000])
    held = small.kept.held
    for _ in range(3):
        small.step(tokens[1000:1040])
        small.step(tokens[1040:1041])
        assert root.used <= root.limit
        small.truncate(1000)
        assert small.kept.held == held
    with pytest.raises(PoolExhaustedError, match="--kv-budget"):
        read(tiny, "snapkv:budget=2000,when=question", tokens[:1000], budget=Budget(3 * 12 * 8192, "KV"))


def test_states_of_a_hybrid_model_come_back_with_the_document(tmp_path, tokens):
    model = load(str(save_hybrid(tmp_path, "lfm2", max_position_embeddings=WINDOW)), device="cpu", dtype=torch.float32)
    context = read(model, "snapkv:budget=100,when=question", tokens[:400])
    said = []
    for _ in range(2):
        context.step(tokens[400:430])
        said.append(context.step(tokens[430:431]))
        context.truncate(400)
    torch.testing.assert_close(said[0], said[1])


def test_a_session_is_asked_saved_and_forked(tiny, text, monkeypatch):
    monkeypatch.setattr(LLM, "heads", lambda self, progress=None: HEADS)
    llm = LLM(tiny, "rocketkv:budget=100,when=question", kv="fp8")
    session = llm.session("codes")
    llm.add_text(session, text)
    llm.prefill(session)
    questions = ["Which street has the museum?", "What is the code of the pier?"]
    said = [llm.ask(question, session, max_tokens=6).text for question in questions]
    llm.save(session)
    for again in (session, llm.session("codes"), llm.fork(session)):
        assert [llm.ask(question, again, max_tokens=6).text for question in questions] == said


def test_what_it_can_not_be_is_refused():
    with pytest.raises(UsageError, match="use one of document, question"):
        parse("snapkv:when=never")


@pytest.mark.parametrize("spec", ["snapkv:budget=128", "snapkv:budget=128,heads=adaptive", "rocketkv:budget=100"])
@pytest.mark.parametrize("kv_format", [None, "fp8"])
def test_a_document_lies_below_and_every_question_finds_all_of_it(tiny, tokens, spec, kv_format, tmp_path):
    root = Budget(3 * 14 * 8192, "KV")
    tiers = Tiers(TierLimits(4 * 8192, 1 << 24, tmp_path))
    mechanism = parse(f"{spec},when=question")
    context = KVContext(tiny, mechanism, budget=Budget(None, "session's KV", root), tiers=tiers, kv_format=kv_format)
    # A budget that never binds: pages are written down as they fill up, as under one that does.
    free = KVContext(tiny, mechanism, budget=Budget(1 << 40, "KV"), kv_format=kv_format)
    for stop in (200, 500, 950):
        for each in (context, free):
            each.extend(tokens[each.length : stop])
        assert root.used <= root.limit
    assert (tiers.used("disk") > 0) == (kv_format is None) and rows(context.kept.layers) == rows(free.kept.layers)
    for question in (tokens[950:990], tokens[1300:1330]):
        said = [each.step(question) for each in (context, free)]
        torch.testing.assert_close(*said, atol=2e-3, rtol=1e-3)
        assert rows(context._asked.layers.layers) == rows(free._asked.layers.layers)
        torch.testing.assert_close(context.step(tokens[3:4]), free.step(tokens[3:4]), atol=2e-3, rtol=1e-3)
        assert root.used <= root.limit
        for each in (context, free):
            each.truncate(950)
    context.free()
    assert root.used == tiers.used("host") == tiers.used("disk") == 0
    tiers.prefetcher.close()
