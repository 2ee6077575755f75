"""The engine over 2 and 3 ranks answers as on one, and what it saves is what one rank saves."""

import functools
import os
import random

import pytest
import torch
from ranks import Ranks as Started

from longspan import LLM
from longspan.distributed.group import Group
from longspan.engine import contexts
from longspan.engine.ranks import Ranks
from longspan.errors import LongspanError, ParallelError, SessionCorruptError, UnknownNameError, UsageError
from longspan.hf.loading import load
from longspan.hf.model import CausalModel
from longspan.retrieval import heads

WORDS = (
    "harbour board met code gate key lantern ferry pier Oslo Riga Tom Lise spare nobody asked May the of a in 7 12 315"
)
ASKED = ("Where is the key?", "What of the gate?")


def text(words=350):
    chosen = random.Random(5).choices(WORDS.split(), k=words)
    return "The code of the gate is 7315. " + " ".join(chosen)


@functools.cache
def model(folder, native=False, whole=True):
    made = load(folder, device="cpu", dtype=torch.float32)
    if native:
        return CausalModel("native", made.model, made.tokenizer, native=True)
    if made.config.model_type == "llama":
        heads.store(made.fingerprint, heads.RetrievalHeads(((1, 0), (2, 1), (2, 3))), {})
    return made


def engine(group, folder, spec, place, placement="auto", native=False):
    """An engine over the group's ranks, and on rank 0 another over none; None on others, once they were let go."""
    os.environ.update(LONGSPAN_CACHE=f"{place}/cache", LONGSPAN_SESSIONS=f"{place}/sessions", LONGSPAN_THREADS="1")
    contexts.CHUNK = 128
    over = LLM(model(folder, native, "experts" not in placement), spec, parallel=Ranks(group, placement))
    return None if over.follow() else (over, LLM(model(folder, native), spec))


def answers(llm, name):
    session = llm.session(name)
    # A tree has two levels above its pages from 1088 tokens on, and units on every rank from 2048 on.
    llm.add_text(session, text(700 if llm.attention.name == "tree" else 350))
    llm.prefill(session)
    found = [llm.ask(question, session, max_tokens=6) for question in ASKED]
    llm.save(session)
    return session.memory.length, [(answer.text, answer.pages) for answer in found]


def read_and_restore(group, folder, spec, place, placement):
    """What both engines answer, each having read itself, and then from what the other has saved."""
    engines = engine(group, folder, spec, place, placement)
    if engines is None:
        return None
    over, alone = engines
    try:
        found = [answers(over, "over"), answers(alone, "alone")]
        for llm, name in ((over, "alone"), (alone, "over")):
            session = llm.session(name)
            fork = llm.fork(session)
            texts = [(a.text, a.pages) for a in (llm.ask(q, fork, max_tokens=6) for q in ASKED)]
            del fork
            texts.append(llm.ask(ASKED[0], session, max_tokens=6).stats.cached_tokens)
            found.append((texts.pop(), texts))
        saved = [llm.session("over").memory.tensors() for llm in (over, alone)]
        assert all(torch.equal(saved[0][n], saved[1][n]) for n in saved[0]), "pages are handed over bit by bit"
        return found
    finally:
        over.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tiny_llama import save_model

    return str(save_model(tmp_path_factory.mktemp("ranked") / "tiny", max_position_embeddings=1024))


@pytest.mark.parametrize(
    ("spec", "size", "placement"),
    [
        ("dense", 3, "ring"),
        ("dense", 2, "sharded"),
        ("dense", 3, "context_parallel"),
        ("superlinear:window=80,spans=2", 3, "auto"),
        ("tree:window=70,leaves=4,beam=2", 3, "auto"),
        ("streaming:window=100,sinks=4", 2, "auto"),
    ],
)
def test_answers_and_sessions_are_those_of_one_rank(ranks, folder, tmp_path, spec, size, placement):
    over, alone, *restored = ranks.run(read_and_restore, folder, spec, str(tmp_path), placement, size=size)[0]
    assert over == alone
    assert restored == [alone, alone]


def taken_back(group, folder, place):
    engines = engine(group, folder, "superlinear:window=80,spans=2", place)
    if engines is None:
        return None
    over, alone = engines
    try:
        tokens, found = model(folder).tokens(text()), []
        assert len(tokens) > 903
        for llm in (over, alone):
            context = llm.new_context(llm.attention)
            context.extend(tokens[:700])
            context.step(tokens[700:710])
            context.truncate(650)
            context.extend(tokens[650:900])
            found.append(context.step(tokens[900:903]))
            assert context.length == 903 and context.tokens == tokens[:903]
            context.free()
            assert context.length == 0
        # What is forgotten by Python alone is given back by the other ranks with the next piece of work.
        del context
        assert over.ranks.group.size == group.size
        return float((found[0] - found[1]).abs().max())
    finally:
        over.close()


def test_tokens_are_taken_back_on_all_ranks(ranks, folder, tmp_path):
    assert ranks.run(taken_back, folder, str(tmp_path), size=3)[0] < 1e-3


def with_states(group, folder, place, spec, native, placement):
    """How far logits over ranks are from one rank's, on a model with recurrent layers, and of a restored context."""
    engines = engine(group, folder, spec, place, placement, native)
    if engines is None:
        return None
    over, alone = engines
    try:
        tokens, found, saved = model(folder).tokens(text())[:600], [], {}
        for llm in (over, alone):
            context = llm.new_context(llm.attention)
            context.extend(tokens[:500])
            states = context.tensors()
            assert [name for name in states if name.startswith("states.")]
            if llm is over:
                assert native == (over.ranks.group.sent["deal"] > 0), "native layers run a part on each rank"
                held = [p.shape[0] for n, p in llm.model.model.named_parameters() if n.endswith("experts.up_proj")]
                assert held == [1 if "experts" in placement else 4], "of four experts over three ranks"
            if llm is alone:
                apart = [float((saved[name] - kept).abs().max()) for name, kept in states.items() if "states" in name]
                assert max(apart) < 1e-4, apart
            saved = saved or context.tensors()
            context.step(tokens[500:510])
            context.truncate(500)
            found.append(context.step(tokens[510:600]))
        for llm in (over, alone):
            context = llm.new_context(llm.attention)
            context.restore(tokens[:500], saved)
            found.append(context.step(tokens[510:600]))
        return [float((logits - found[1]).abs().max()) for logits in found]
    finally:
        over.close()


@pytest.mark.parametrize(
    ("spec", "native", "placement"),
    [("superlinear:window=80,spans=2", False, "auto"), ("dense", True, "auto"), ("dense", True, "auto,experts")],
)
def test_recurrent_states_are_those_of_one_rank(ranks, tmp_path, spec, native, placement):
    """Modules of transformers run all tokens on every rank, native layers a part, and hand states along; of experts a
    rank may hold a part.
    """
    from tiny_hybrid import save_hybrid

    folder = str(save_hybrid(tmp_path / "hybrid", "nemotron_h"))
    found = ranks.run(with_states, folder, str(tmp_path), spec, native, placement, size=3)[0]
    assert max(found) < 2e-4, found


def damaged(group, folder, place):
    engines = engine(group, folder, "dense", place)
    if engines is None:
        return None
    over, alone = engines
    try:
        tokens = model(folder).tokens(text())[:300]
        context = alone.new_context(alone.attention)
        context.extend(tokens)
        tensors = context.tensors()
        told = []
        for wrong in ({"1.pages": tensors["1.pages"].flip(0)}, {"2.v": tensors["2.v"][:, :1]}):
            other = over.new_context(over.attention)
            with pytest.raises(SessionCorruptError) as error:
                other.restore(tokens, {**tensors, **wrong})
            told.append((str(error.value), other.length))
        other.restore(tokens, tensors)
        return told, other.length
    finally:
        over.close()


def test_a_damaged_session_is_refused_by_all_ranks_and_work_goes_on(ranks, folder, tmp_path):
    told, length = ranks.run(damaged, folder, str(tmp_path), size=2)[0]
    assert [at for _, at in told] == [0, 0] and all("read again" in line for line, _ in told)
    assert length == 300


def lost(group, folder, place):
    """Rank 1 is there when a context is made, and dies before it is read."""
    shared = Ranks(group)
    if group.rank:
        shared.word.hear()
        os._exit(1)
    llm = LLM(model(folder), "dense", parallel=shared)
    session = llm.session()
    llm.add_text(session, text(100))
    told = []
    for _ in range(2):
        try:
            llm.ask(ASKED[0], session)
        except LongspanError as error:
            told.append((type(error), str(error)))
    return told


def test_a_rank_that_dies_makes_requests_fail_in_one_line(folder, tmp_path):
    mortal = Started(tmp_path, 2, timeout=20.0)
    try:
        for pipe in mortal.pipes:
            pipe.send((lost, (folder, str(tmp_path)), 2))
        ((first, second), is_error) = mortal.answers([0])[0]
        assert not is_error and first == second, "a request after that fails at once"
        assert first[0] is ParallelError and "\n" not in first[1] and "start all ranks again" in first[1]
    finally:
        mortal.close()


def refused(group, folder, place):
    if group.rank:
        return None
    told = []
    for options in (
        {"attention": "h2o"},
        {"attention": "dense", "kv": "int8"},
        {"attention": "dense", "prefill": "quest"},
        {"attention": "dense", "parallel": Ranks(group, "auto,experts")},
    ):
        try:
            LLM(model(folder), **({"parallel": object.__new__(Ranks)} | options))
        except UsageError as error:
            told.append(str(error))
    return told


def test_what_ranks_do_not_serve_is_refused(ranks, folder, tmp_path):
    h2o, kv, prefill, experts = ranks.run(refused, folder, str(tmp_path), size=1)[0]
    assert "use one of dense" in h2o and "--kv" in kv and "quest" in prefill and "leave out experts" in experts
    with pytest.raises(UnknownNameError, match="sharded, ring, context_parallel, and ,experts behind it"):
        Ranks(Group.alone(), "ring,expert")
