"""Questions and answers on a tiny model: what transformers alone would write, whatever came in between."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from longspan import LLM
from longspan.attention import Mechanism
from longspan.engine import prompts
from longspan.engine.index_context import IndexContext
from longspan.engine.kv_context import KVContext
from longspan.engine.sampler import SamplingParams
from longspan.errors import Cancelled, ContextTooLongError, DocumentError, UnknownNameError, UsageError
from longspan.retrieval.heads import RetrievalHeads
from longspan.sessions.session import Turn
from tiny_llama import CHUNK, SPECS, WINDOW

QUESTION = "What is the code of the tower?"
OTHER = "Which street has the museum?"


@pytest.fixture(params=SPECS)
def spec(request):
    return request.param


@pytest.fixture(scope="session")
def plain(folder):
    """Greedy tokens of transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()

    def generate(prompt, count):
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=count, do_sample=False, pad_token_id=0, use_cache=True
        )
        return out[0, len(prompt) :].tolist()

    return generate


def asked(llm, session, question=QUESTION, **sampling):
    return llm.ask(question, session, **{"max_tokens": 24, **sampling}).text


def with_text(llm, text, name="codes"):
    session = llm.session()
    llm.add_text(session, text, name)
    llm.prefill(session)
    return session


# --- what is written ------------------------------------------------------------------------------------------


def test_greedy_is_what_transformers_writes(make_llm, tiny, plain):
    answer = make_llm("dense").ask(QUESTION, max_tokens=60)
    tokens = plain(prompts.plain(tiny, QUESTION, []), 60)
    expected = [token for token in tokens if token not in tiny.end_tokens]
    assert answer.text == tiny.decode(expected)
    assert answer.stats.decoded_tokens == len(expected) > 20
    ended = ("length", "length") if len(expected) == 60 else ("stop", "end")
    assert (answer.finish_reason, answer.stopped_by) == ended


def test_greedy_over_documents_is_what_transformers_writes(make_llm, tiny, plain, text):
    llm = make_llm("dense")
    session = llm.session()
    llm.add_text(session, text[: len(text) // 2], "one")
    llm.add_text(session, text[len(text) // 2 :], "two")
    answer = llm.ask(QUESTION, session, max_tokens=40)
    prompt = (
        prompts.before_documents(tiny)
        + tiny.tokens(text[: len(text) // 2])
        + prompts.separator(tiny, "two")
        + tiny.tokens(text[len(text) // 2 :])
        + prompts.after_documents(tiny, QUESTION, [])
    )
    assert len(prompt) > 2 * CHUNK
    expected = [token for token in plain(prompt, 40) if token not in tiny.end_tokens]
    assert answer.own_words == tiny.decode(expected)
    assert len(expected) > 10
    assert answer.stats.prompt_tokens == len(prompt)


def test_an_end_token_ends_the_answer(make_llm, tiny, plain, monkeypatch):
    tokens = plain(prompts.plain(tiny, QUESTION, []), 20)
    end = next(token for token in tokens[3:] if token not in tokens[:3])
    at = tokens.index(end)
    monkeypatch.setitem(tiny.__dict__, "end_tokens", frozenset({end}))
    answer = make_llm("dense").ask(QUESTION, max_tokens=20)
    assert answer.text == tiny.decode(tokens[:at])
    assert (answer.finish_reason, answer.stopped_by) == ("stop", "end") and answer.stats.decoded_tokens == at


def test_a_seed_repeats_an_answer(make_llm, text):
    llm = make_llm("dense")
    session = with_text(llm, text)
    drawn = [asked(llm, session, temperature=1.5, seed=seed) for seed in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]
    params = SamplingParams(max_tokens=24, temperature=1.5, seed=1)
    assert llm.ask(QUESTION, session, params).text == drawn[0]
    assert asked(llm, session) != drawn[0]


def test_pieces_join_to_the_answer(make_llm, text, spec):
    llm = make_llm(spec)
    session = with_text(llm, text)
    generation = llm.generate(QUESTION, session, max_tokens=24)
    pieces = []
    for piece in generation:
        pieces.append(piece)
        assert "".join(pieces) == generation.answer.text
    assert len(pieces) > 5 and all(pieces)
    assert generation.answer.text == asked(llm, session)
    assert generation.answer.attention == llm.attention.describe()
    assert generation.finish() is generation.answer


@pytest.mark.parametrize("count", [1, 2, 17])
def test_no_more_tokens_than_asked_for(make_llm, tiny, plain, count):
    answer = make_llm("dense").ask(QUESTION, max_tokens=count)
    assert answer.stats.decoded_tokens == count
    assert (answer.finish_reason, answer.stopped_by) == ("length", "length")
    assert answer.text == tiny.decode(plain(prompts.plain(tiny, QUESTION, []), count))


def test_a_stop_string_ends_the_answer_before_it(make_llm, text):
    llm = make_llm("dense")
    session = with_text(llm, text)
    whole = asked(llm, session, max_tokens=40)
    stop = whole[11:14]
    answer = llm.ask(QUESTION, session, max_tokens=40, stop=[stop, "no such text"])
    assert answer.text == whole[: whole.index(stop)]
    assert (answer.finish_reason, answer.stopped_by) == ("stop", "string")
    assert answer.stats.decoded_tokens < 40


@pytest.mark.parametrize("ended", ["end", "length"])
def test_a_stop_string_that_waited_for_a_longer_one_counts_whatever_ended_the_answer(
    make_llm, tiny, plain, monkeypatch, ended
):
    tokens = plain(prompts.plain(tiny, QUESTION, []), 20)
    at = next(i for i in range(6, 20) if tokens[i] not in tokens[:i])
    if ended == "end":
        monkeypatch.setitem(tiny.__dict__, "end_tokens", frozenset({tokens[at]}))
    whole = tiny.decode(tokens[:at])
    # The second may begin there, too, so that the first waits until nothing follows.
    answer = make_llm("dense").ask(QUESTION, max_tokens=at, stop=[whole[-2:], whole[-2:] + "\ue000"])
    assert answer.text == whole[: whole.index(whole[-2:])]
    assert (answer.finish_reason, answer.stopped_by) == ("stop", "string")


def test_an_answer_is_cut_where_the_window_ends(make_llm, tiny, text):
    llm = make_llm("dense")
    session = with_text(llm, text)
    after = len(prompts.after_documents(tiny, QUESTION, []))
    room = 5
    filler = " gate" * WINDOW
    used = session.memory.length + after + len(prompts.separator(tiny, "more"))
    _, offsets = tiny.tokens_with_offsets(filler)
    llm.add_text(session, filler[: offsets[WINDOW - used - room][0]], "more")
    answer = llm.ask(QUESTION, session, max_tokens=50)
    assert answer.stats.prompt_tokens == WINDOW - room
    assert answer.stats.decoded_tokens == room and answer.finish_reason == "length"
    assert any("window is full" in note for note in answer.notes)
    llm.add_text(session, filler, "too much")
    answer = llm.ask(QUESTION, session, max_tokens=3)
    assert any("longer than the window" in note for note in answer.notes)


# --- nothing of a question stays ------------------------------------------------------------------------------


def test_closing_early_takes_back_what_was_read(make_llm, text, spec):
    llm = make_llm(spec)
    session = with_text(llm, text)
    expected, length = asked(llm, session), session.memory.length
    for pieces in (0, 1, 4):
        generation = llm.generate(OTHER, session, max_tokens=50)
        for _ in range(pieces):
            next(generation)
        if pieces and isinstance(session.memory, KVContext):
            assert session.memory.length > length, "there would be nothing to take back"
        generation.close()
        assert list(generation) == []
        assert session.memory.length == length
        assert asked(llm, session) == expected
    assert generation.answer.finish_reason == generation.answer.stopped_by == "cancelled"


def test_an_interrupt_while_answering_takes_back_what_was_read(make_llm, text, spec, monkeypatch):
    llm = make_llm(spec)
    session = with_text(llm, text)
    expected, length = asked(llm, session), session.memory.length
    generation = llm.generate(OTHER, session, max_tokens=50)
    next(generation)
    with monkeypatch.context() as patch:
        interrupt_attention(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            list(generation)
    assert session.memory.length == length
    assert asked(llm, session) == expected


def test_a_second_question_reuses_everything(make_llm, text, spec):
    llm = make_llm(spec)
    session = llm.session()
    llm.add_text(session, text)
    first = llm.ask(QUESTION, session, max_tokens=8)
    assert first.stats.cached_tokens == 0
    length = session.memory.length
    second = llm.ask(OTHER, session, max_tokens=8)
    assert second.stats.cached_tokens == session.memory.length == length >= len(session.tokens) > 300
    assert llm.prefill(session).read_tokens == 0
    assert llm.ask(QUESTION, session, max_tokens=8).text == first.text


# --- interrupted reading --------------------------------------------------------------------------------------


def interrupt_attention(patch, call):
    """Ctrl-C at the n-th attention (from 1): in some layer of some chunk."""
    calls, real = 0, Mechanism.attend

    def attend(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    patch.setattr(Mechanism, "attend", attend)


@pytest.mark.parametrize("call", [1, 2, 4, 5])
def test_an_interrupt_inside_a_layer_keeps_whole_chunks(make_llm, text, spec, call, monkeypatch):
    llm = make_llm(spec)
    untouched = with_text(llm, text)
    expected = asked(llm, untouched)
    session = llm.session()
    llm.add_text(session, text)
    with monkeypatch.context() as patch:
        interrupt_attention(patch, call)
        with pytest.raises(Cancelled, match="what was read is kept"):
            llm.prefill(session)
    layers = 2 if isinstance(session.memory, IndexContext) else 3
    kept = (call - 1) // layers * CHUNK
    assert session.memory.length == kept
    assert all(kv.length == kept for kv in session.memory._layers())
    assert all(kv.pool.slots - kv.pool.free == kv.pages_held for kv in session.memory._layers())
    stats = llm.prefill(session)
    assert stats.cached_tokens == kept
    assert stats.read_tokens == session.memory.length - kept
    assert asked(llm, session) == expected
    torch.testing.assert_close(*(last_keys(s.memory) for s in (session, untouched)))


def last_keys(context):
    kv = context._layers()[-1]
    return kv.keys(kv.length - 1, kv.length)


def test_an_interrupt_between_chunks_keeps_them(make_llm, text, spec):
    llm = make_llm(spec)
    expected = asked(llm, with_text(llm, text))
    session = llm.session()
    llm.add_text(session, text)

    def progress(what, done, total):
        assert what == "reading" and total > 2 * CHUNK
        if done >= 2 * CHUNK:
            raise KeyboardInterrupt

    with pytest.raises(Cancelled, match=f"after {2 * CHUNK} of"):
        llm.prefill(session, progress)
    assert session.memory.length == 2 * CHUNK
    assert asked(llm, session) == expected


def test_progress_rises_to_the_whole(make_llm, text, spec):
    llm = make_llm(spec)
    session = llm.session()
    llm.add_text(session, text)
    told = []
    llm.prefill(session, lambda what, done, total: told.append((what, done, total)))
    assert {(what, total) for what, _, total in told} == {("reading", session.memory.length)}
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert told[-1][1] == session.memory.length
    again = []
    llm.prefill(session, lambda *call: again.append(call))
    assert again == []


# --- sessions that grow ---------------------------------------------------------------------------------------


def test_documents_added_later_extend_the_context(make_llm, text, spec):
    llm = make_llm(spec)
    cut = text.index(".", len(text) // 3) + 1
    together = llm.session()
    llm.add_text(together, text[:cut], "one")
    llm.add_text(together, text[cut:], "two")
    expected = asked(llm, together)
    session = with_text(llm, text[:cut], "one")
    asked(llm, session)
    before = session.memory.length
    llm.add_text(session, text[cut:], "two")
    stats = llm.prefill(session)
    assert stats.cached_tokens == before
    assert stats.read_tokens == together.memory.length - before
    assert session.tokens == together.tokens and session.memory.tokens == together.memory.tokens
    assert asked(llm, session) == expected


def test_a_document_is_not_read_twice(make_llm, text, tmp_path):
    llm = make_llm("dense")
    (tmp_path / "codes.txt").write_text(text)
    session = llm.session()
    reading = llm.read(session, [tmp_path / "codes.txt"])
    assert [document.name for document in session.documents] == [document.name for document in reading.documents]
    length = session.memory.length
    llm.read(session, [tmp_path / "codes.txt"])
    assert len(session.documents) == 1 and session.memory.length == length
    with pytest.raises(DocumentError, match=r"missing\.txt"):
        llm.read(session, [tmp_path / "missing.txt"])
    assert len(session.documents) == 1


def test_attention_chosen_by_itself_is_dense_until_the_window_is_too_small(make_llm, text):
    llm = make_llm()
    session = with_text(llm, text)
    assert isinstance(session.memory, KVContext) and session.memory.mechanism.name == "dense"
    assert llm.ask(QUESTION, session, max_tokens=4).attention == "dense"
    assert session.head > 0
    llm.add_text(session, text[::-1], "backwards")
    assert len(session.tokens) < WINDOW, "and yet no room is left for question and answer"
    answer = llm.ask(QUESTION, session, max_tokens=24)
    assert isinstance(session.memory, IndexContext)
    assert session.head == 0
    assert answer.attention == "retrieval"
    assert session.memory.length == len(session.tokens)
    fresh = make_llm("retrieval")
    both = with_text(fresh, text)
    fresh.add_text(both, text[::-1], "backwards")
    assert asked(fresh, both) == answer.text


def test_a_conversation_is_remembered_where_it_was_asked_for(make_llm, tiny, plain, text):
    llm = make_llm("dense")
    session = with_text(llm, text)
    first = llm.ask(QUESTION, session, max_tokens=12)
    assert session.turns == []
    assert llm.ask(QUESTION, session, max_tokens=12, remember=True).text == first.text
    assert session.turns == [Turn(QUESTION, first.text.strip())]
    prompt = (
        prompts.before_documents(tiny) + tiny.tokens(text) + prompts.after_documents(tiny, OTHER, list(session.turns))
    )
    expected = tiny.decode([token for token in plain(prompt, 20) if token not in tiny.end_tokens])
    assert llm.ask(OTHER, session, max_tokens=20).own_words == expected


def test_a_conversation_longer_than_the_window_without_documents_loses_its_oldest_turns(make_llm):
    llm = make_llm("dense")
    session = llm.session()
    session.turns = [Turn("gate " * 400, "tower " * 400), Turn("Who?", "Lise.")]
    answer = llm.ask(QUESTION, session, max_tokens=12)
    short = llm.session()
    short.turns = session.turns[1:]
    assert answer.text == llm.ask(QUESTION, short, max_tokens=12).text != llm.ask(QUESTION, max_tokens=12).text
    assert len(session.turns) == 2


@pytest.mark.parametrize("spec", ["streaming:window=100", "superlinear:window=80", "retrieval:window=128,read=place"])
def test_a_conversation_longer_than_the_window_is_answered_or_told(make_llm, text, spec):
    llm = make_llm(spec)
    session = with_text(llm, text)
    session.turns = [Turn("gate " * 300, "tower " * 300)] * 2
    answer = llm.ask(QUESTION, session, max_tokens=9)
    assert answer.text or answer.notes


# --- what is cited --------------------------------------------------------------------------------------------


def test_citations_are_the_documents_own_words(make_llm, text, spec):
    llm = make_llm(spec)
    session = with_text(llm, text, "codes")
    llm.add_text(session, "Nothing of that kind. " * 20, "other")
    answer = llm.ask("What is the code of the tower in street 28?", session, max_tokens=4)
    assert answer.citations
    held = {document.name: document.text for document in session.documents}
    seen = {}
    for citation in answer.citations:
        assert citation.text and held[citation.doc][citation.start : citation.end] == citation.text
        assert citation.chosen_by in ("heads", "lexical", "heads+lexical", "attention")
        assert 0 < citation.score <= 1
        characters = {(citation.doc, at) for at in range(citation.start, citation.end)}
        told = seen.setdefault(citation.source == "attention", set())
        assert not characters & told, "a passage is told twice"
        told |= characters


def test_every_session_is_searched_by_its_own_words(make_llm):
    llm = make_llm("dense")
    lengths, session = set(), llm.session()
    for i, word in enumerate(["lantern", "kettles", "ladders", "helmets"] * 3):
        said = ["In the cellar there is nothing."] * 40
        said[4 + 3 * i] = f"The {word} are here."
        llm.add_text(session, " ".join(said))
        llm.prefill(session)
        lengths.add(session.memory.length)
        chosen = llm._chooser.choose(f"Where are the {word}?", session, None, count=1, reach=1, lexical=True)
        assert [choice.by for choice in chosen.pages] == ["lexical"]
        assert word in chosen.citations[0].text
        del chosen, session
        session = llm.session()  # directly after: it takes the place in memory, and so the id(), of the one before
    assert len(lengths) == 1 and session.documents == []


# --- what is refused ------------------------------------------------------------------------------------------


def test_an_empty_question_is_refused(make_llm):
    for question in ("", "  \n\t"):
        with pytest.raises(UsageError, match="empty"):
            make_llm("dense").generate(question)


def test_a_question_longer_than_the_window_is_refused(make_llm, tiny, text):
    llm = make_llm("dense")
    session = with_text(llm, text)
    question = "gate " * WINDOW
    with pytest.raises(ContextTooLongError, match=f"{len(tiny.tokens(question))} tokens.*{WINDOW}"):
        llm.generate(question, session)
    assert asked(llm, session)


def test_sampling_is_given_once(make_llm):
    with pytest.raises(UsageError, match="not both"):
        make_llm("dense").generate(QUESTION, None, SamplingParams(), max_tokens=3)
    with pytest.raises(UsageError, match="temperature"):
        make_llm("dense").generate(QUESTION, temperature=-1)


def test_an_unknown_attention_is_refused_before_a_model_is_loaded():
    with pytest.raises(UnknownNameError, match=r"dense.*retrieval"):
        LLM("no such model", "quadratic")
    with pytest.raises(UnknownNameError, match="smollm2"):
        LLM("no such model")


def test_a_named_model_is_loaded(folder, tiny, calibrated, monkeypatch):
    monkeypatch.setenv("LONGSPAN_MODEL", str(folder))
    llm = LLM(attention="dense", device="cpu", dtype=torch.float32)
    assert llm.model.fingerprint == tiny.fingerprint
    assert llm.ask(QUESTION, max_tokens=6).text == LLM(tiny, "dense").ask(QUESTION, max_tokens=6).text


def test_heads_that_can_not_be_stored_are_used_all_the_same(tiny, text, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("a file where the folder should be")
    monkeypatch.setenv("LONGSPAN_CACHE", str(tmp_path / "file"))
    found = RetrievalHeads(((1, 0), (2, 1)))
    monkeypatch.setattr("longspan.engine.making.calibrate", lambda model, progress: found)  # random weights have none
    told = []
    llm = LLM(tiny, "retrieval:window=128,pages=2", say=told.append)
    assert llm.ask(QUESTION, with_text(llm, text), max_tokens=4).citations
    assert llm.heads() is found
    assert "LONGSPAN_CACHE" in told[-1] and "looks for them again" in told[-1] and len(told) == 2
