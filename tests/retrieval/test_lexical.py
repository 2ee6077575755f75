"""Lexical search: BM25 against its formula, the edges, and languages."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.errors import UnknownNameError, UsageError
from longspan.retrieval.lexical import LexicalIndex

PASSAGES = [
    "The harbour master walked along the quay and counted the ships.",
    "A ship's cook needs flour, salt and patience.",
    "Nobody counts the gulls.",
    "Salt, salt and more salt: the sea is made of it.",
]


def bm25(passages: list[list[str]], query: list[str]) -> list[float]:
    """The formula, word by word."""
    mean = sum(map(len, passages)) / len(passages)
    scores = []
    for passage in passages:
        score = 0.0
        for word in query:
            holding = sum(word in other for other in passages)
            f = passage.count(word)
            idf = math.log(1 + (len(passages) - holding + 0.5) / (holding + 0.5))
            score += idf * f / (f + 1.5 * (1 - 0.75 + 0.75 * len(passage) / mean))
        scores.append(score)
    return scores


words = st.lists(st.sampled_from(["alpha", "beta", "gamma", "delta", "rho"]), max_size=12)


@settings(deadline=None)
@given(passages=st.lists(words, min_size=1, max_size=8), query=words)
def test_scores_follow_the_formula(passages, query):
    scores = LexicalIndex([" ".join(p) for p in passages], "none").scores(" ".join(query))
    assert scores.dtype == np.float32
    expected = bm25(passages, query) if any(passages) else [0.0] * len(passages)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)


def test_best_first_matches_only_ties_in_order():
    index = LexicalIndex(PASSAGES)
    found = index.search("salt", 10)
    assert [i for i, _ in found] == [3, 1]
    assert found[0][1] > found[1][1] > 0
    assert [float(s) for s in index.scores("salt")[[3, 1]]] == [s for _, s in found]
    assert index.search("salt", 1) == found[:1]
    assert index.search("salt", 0) == []
    twins = LexicalIndex(["other things", *["same words"] * 200])  # short sorts are stable of themselves
    assert [i for i, _ in twins.search("words", 150)] == list(range(1, 151))


def test_stems_case_and_apostrophes():
    index = LexicalIndex(PASSAGES)
    assert {i for i, _ in index.search("SHIPS", 4)} == {0, 1}
    assert {i for i, _ in index.search("walking, counting", 4)} == {0, 2}
    assert LexicalIndex(PASSAGES, "none").search("walking", 4) == []


@pytest.mark.parametrize("query", ["", "   ", "?!,", "the and of", "What is it?", "zeppelin", "\x00\ud800"])
def test_a_query_without_a_match_gives_zeros(query):
    index = LexicalIndex(PASSAGES)
    scores = index.scores(query)
    assert scores.shape == (4,)
    assert scores.dtype == np.float32
    assert not scores.any()
    assert index.search(query, 3) == []


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("passages", [[], [""], ["", "  "], ["the of and"], ["?!"]])
def test_passages_without_words(passages):
    index = LexicalIndex(passages)
    assert len(index) == len(passages)
    assert index.scores("anything").tolist() == [0.0] * len(passages)
    assert index.search("anything", 2) == []


def test_an_empty_passage_among_others_never_matches():
    index = LexicalIndex(["", *PASSAGES, "?"])
    assert [i for i, _ in index.search("salt", 9)] == [4, 2]


def test_identifiers_ligatures_and_accents():
    index = LexicalIndex(["set max_tokens to 4096", "the ﬁnal ｔｅｓｔ", "cafe\u0301 noir", "nothing"])
    assert [i for i, _ in index.search("max tokens", 4)] == [0]
    assert [i for i, _ in index.search("4096", 4)] == [0]
    assert [i for i, _ in index.search("final", 4)] == [1]
    assert [i for i, _ in index.search("test", 4)] == [1]
    assert [i for i, _ in index.search("café", 4)] == [2]


@pytest.mark.parametrize(
    ("language", "passages", "query"),
    [
        ("russian", ["Мы читали старые книги.", "Погода сегодня плохая."], "старая книга"),
        ("none", ["昨天我去商店买了面包。", "今天天气很好。"], "面包在哪里"),
        ("none", ["今天", "天今"], "今天"),
        ("none", ["お茶を飲みます。", "電車に乗ります。"], "茶"),
        ("none", ["나는 서울에서 일한다.", "날씨가 좋다."], "서울"),
        ("none", ["ฉันกินข้าวที่บ้าน", "อากาศดีมาก"], "ข้าว"),
        ("hindi", ["हिन्दी भाषा की किताब", "मौसम अच्छा है"], "हिन्दी"),
        ("arabic", ["قرأت الكتاب في المكتبة", "الطقس جميل"], "الكتاب"),
        ("german", ["Die Häuser am See", "Das Wetter ist gut"], "Haus am See"),
        ("english", ["昨天我去商店买了面包。", "Вчера был дождь."], "面包"),
    ],
)
def test_languages(language, passages, query):
    assert [i for i, _ in LexicalIndex(passages, language).search(query, 1)] == [0]


def test_signs_are_part_of_the_word():
    assert not LexicalIndex(["हिन्दी", "शब्द"], "none").scores("हन्द").any()


def test_stop_words_belong_to_the_language():
    assert not LexicalIndex(["what and who, they asked", "ships"]).scores("What is it, and who are you?").any()
    assert not LexicalIndex(["und der die das", "Wetter"], "german").scores("und der").any()
    assert LexicalIndex(["to be or not to be", "weather"], "none").scores("to be").any()


def test_unknown_language_and_bad_k():
    with pytest.raises(UnknownNameError, match=r"'klingon'.*english.*russian"):
        LexicalIndex(PASSAGES, "klingon")
    with pytest.raises(UsageError, match="-1"):
        LexicalIndex(PASSAGES).search("salt", -1)


@settings(deadline=None, max_examples=50)
@given(passages=st.lists(st.text(), max_size=4), query=st.text(), language=st.sampled_from(["none", "english"]))
def test_any_text_at_all(passages, query, language):
    index = LexicalIndex(passages, language)
    scores = index.scores(query)
    assert scores.shape == (len(passages),)
    assert (scores >= 0).all()
    assert all(score > 0 for _, score in index.search(query, 3))


def test_three_thousand_passages_quietly_and_in_time(capfd):
    rng = random.Random(0)
    vocabulary = [f"word{i}" for i in range(20_000)]
    passages = [" ".join(rng.choices(vocabulary, k=64)) for _ in range(3000)]
    passages[1234] += " xylophone"
    started = time.process_time()
    index = LexicalIndex(passages)
    assert time.process_time() - started < 3  # measured 0.4 s; a busy machine gets room
    assert [i for i, _ in index.search("where is the xylophone", 5)] == [1234]
    assert capfd.readouterr() == ("", "")


def test_threads_may_share_an_index():
    index = LexicalIndex([f"ship{i} walking counted {i}" for i in range(200)])
    wrong: list[int] = []

    def ask(start: int) -> None:
        for i in range(start, 200, 4):
            if index.search(f"ship{i} walked", 1)[0][0] != i:
                wrong.append(i)

    threads = [threading.Thread(target=ask, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_importing_the_module_is_cheap():
    import subprocess

    program = (
        "import sys, longspan.retrieval.lexical, longspan.retrieval.documents;"
        "sys.exit(any(m in sys.modules for m in ('bm25s', 'Stemmer', 'markitdown', 'charset_normalizer')))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_jax_is_not_started(tmp_path):
    """bm25s would start it where it is installed, and it takes most of a GPU's memory."""
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text("print('started')")
    code = "from longspan.retrieval.lexical import LexicalIndex as L; L(['a fox']).scores('fox'); import jax"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "started\n"  # once, by the last import alone
