"""Streaming text against the one-shot definition: decode everything, cut at the earliest stop."""

from collections.abc import Callable
from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from longspan.engine.stops import TextStream, normalise_stops
from longspan.errors import UsageError

Decode = Callable[[list[int]], str]

LINES = [
    "The long answer ends here, and the next one begins.\n\nUser: what of it?\n",
    "Длинный ответ кончается здесь, а дальше идёт следующий вопрос.",
    "这个答案很长，但是它在这里结束。下一个问题是什么？",
    "Emoji: 👩‍👩‍👧‍👦 🙂🙃 🇫🇷 naïve café <|im_end|> </s> ### END END",
]


def bytes_decode(ids: list[int]) -> str:
    """Toy tokenizer: a token is a byte."""
    return bytes(ids).decode("utf-8", errors="replace")


@cache
def bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
    )
    tokenizer.train_from_iterator(LINES * 3, trainer)
    return tokenizer


@cache
def sentencepiece() -> Tokenizer:
    """Leading space as `▁`, dropped at the start by the decoder; unknown characters as byte tokens."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnop.,\n"]
    pairs = [("▁", "a"), ("a", "b"), ("▁", "▁")]
    vocab = {piece: i for i, piece in enumerate([*pieces, *("".join(pair) for pair in pairs)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def one_shot(full: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition, written plainly."""
    for start in range(len(full)):
        here = [stop for stop in stops if full[start : start + len(stop)] == stop]
        if here:
            return full[:start], max(here, key=len)
    return full, None


def check(decode: Decode, ids: list[int], stops: list[str]) -> None:
    """Stream `ids`; what is shown is a prefix of the truth always, all of it at the end, and never late."""
    truth, stopped = one_shot(decode(ids), stops)
    stream = TextStream(decode, stops)
    shown = ""
    for count, token in enumerate(ids, start=1):
        shown += stream.push(token)
        assert truth.startswith(shown)
        assert stream.text == shown
        if stream.stopped is None:
            waiting = decode(ids[:count])[len(shown) :].rstrip("\ufffd")
            begun = any(stop.startswith(waiting) for stop in stops)
            assert not waiting or begun, "text that could not begin a stop was held back"
    shown += stream.finish()
    assert (shown, stream.stopped) == (truth, stopped)
    assert (stream.text, stream.finish()) == (shown, "")


# A small alphabet makes stops meet text often; characters of 1, 2, 3 and 4 bytes, a real U+FFFD among them.
TEXT = st.text(st.sampled_from("aab .\nйь中文🙂👩\u200d\ufffd"), max_size=60) | st.text(max_size=60)
STOPS = st.lists(st.text(st.sampled_from("aab .\nй中🙂\ufffd"), min_size=1, max_size=4), max_size=4)


@given(TEXT, STOPS)
@settings(deadline=None)
@example("abcx", ["abcd", "bc"])
@example("abcd", ["abcd", "bc"])
@example("a\n\n", ["\n", "\n\n"])
@example("aaab", ["aab"])
def test_valid_text_byte_by_byte(text: str, stops: list[str]) -> None:
    check(bytes_decode, list(text.encode("utf-8", errors="replace")), stops)


@given(st.lists(TEXT, max_size=20), STOPS)
@settings(deadline=None)
def test_any_split_of_text(pieces: list[str], stops: list[str]) -> None:
    """Tokens of any length, none and U+FFFD included, so that stops lie in, at and across their edges."""
    check(lambda ids: "".join(pieces[i] for i in ids), list(range(len(pieces))), stops)


@given(
    st.binary(max_size=80) | st.lists(st.sampled_from(b"a\xe4\xb8\xad\xf0\x9f\x98\x80\xff"), max_size=80),
    STOPS,
)
@settings(deadline=None)
def test_any_bytes(ids: bytes | list[int], stops: list[str]) -> None:
    check(bytes_decode, list(ids), stops)


@given(TEXT | st.sampled_from(LINES), STOPS)
@settings(deadline=None)
def test_byte_level_bpe(text: str, stops: list[str]) -> None:
    check(bpe().decode, bpe().encode(text).ids, stops)


@given(st.lists(st.integers(0, 419), max_size=60), STOPS)
@settings(deadline=None)
def test_byte_level_bpe_any_tokens(ids: list[int], stops: list[str]) -> None:
    """Any ids, special ones (no text) and broken characters included."""
    check(bpe().decode, ids, stops)


@given(st.text(st.sampled_from("aab .\nйь中文🙂"), max_size=60), STOPS)
@settings(deadline=None)
@example("🙂" * 20, [])
@example("  a" + " " * 40 + "a", [])
@example("\n" * 40 + " a b", [])
def test_leading_spaces_and_byte_fallback(text: str, stops: list[str]) -> None:
    check(sentencepiece().decode, sentencepiece().encode(text).ids, stops)


def test_the_small_tokenizers_are_what_they_should_be() -> None:
    for line in LINES:
        ids = bpe().encode(line).ids
        assert bpe().decode(ids) == line
        assert len(ids) < len(line.encode())
    ids = sentencepiece().encode("a 中").ids
    assert [sentencepiece().decode(ids), sentencepiece().decode(ids[-4:])] == ["a 中", "中"], "a space is lost"


def test_stop_in_the_middle_of_a_token() -> None:
    words = ["one ", "two END three", " four"]
    stream = TextStream(lambda ids: "".join(words[i] for i in ids), ["END"])
    assert [stream.push(0), stream.push(1), stream.push(2), stream.finish()] == ["one ", "two ", "", ""]
    assert (stream.stopped, stream.text) == ("END", "one two ")


def test_possible_beginning_is_held_and_released() -> None:
    stream = TextStream(bytes_decode, "END")
    assert [stream.push(byte) for byte in b"xENxEN"] == ["x", "", "", "ENx", "", ""]
    assert (stream.finish(), stream.stopped) == ("EN", None)


def test_a_stop_waits_for_an_earlier_one_that_may_be_completed() -> None:
    stream = TextStream(bytes_decode, ["abcd", "bc"])
    assert [stream.push(byte) for byte in b"abc"] == ["", "", ""]
    assert (stream.stopped, stream.finish(), stream.stopped) == (None, "a", "bc")


@pytest.mark.parametrize("bad", [b"\xff", b"\xe4\xb8", b"\xf0\x9f\x98"])
def test_broken_bytes_are_not_held_longer_than_four_tokens(bad: bytes) -> None:
    ids = list(bad * 40)
    stream = TextStream(bytes_decode)
    shown = ""
    for count, token in enumerate(ids, start=1):
        shown += stream.push(token)
        assert len(shown) >= len(bytes_decode(ids[: max(0, count - 4)]))
    assert shown + stream.finish() == bytes_decode(ids)


def test_character_that_never_completes_shows_at_finish() -> None:
    stream = TextStream(bytes_decode)
    assert "".join(stream.push(byte) for byte in b"ok \xf0\x9f\x98") == "ok "
    assert stream.finish() == "\ufffd"


def test_malformed_byte_fallback_loses_nothing_that_follows() -> None:
    """The decoder spoils what was shown already: it stays, and the text after it comes."""
    tokenizer = sentencepiece()
    stray = [tokenizer.token_to_id("<0xFF>")]
    ids = tokenizer.encode("a 中文").ids + stray + tokenizer.encode("b中 ab.").ids
    stream = TextStream(tokenizer.decode)
    shown = "".join(stream.push(token) for token in ids) + stream.finish()
    assert (shown[:4], shown[-6:]) == ("a 中文", "b中 ab.")


@pytest.mark.parametrize(("words", "want"), [("Hello| |.| Next", "Hello . Next"), ("a |\b| b", "a b")])
def test_decoder_that_takes_a_space_back(words: str, want: str) -> None:
    pieces = words.split("|")
    stream = TextStream(lambda ids: "".join(pieces[i] for i in ids).replace(" .", ".").replace(" \b", ""))
    assert "".join(stream.push(i) for i in range(len(pieces))) + stream.finish() == want


def test_decoder_that_drops_all_leading_space() -> None:
    words = ["a", *["  \n"] * 20, *["b", " "] * 9]
    check(lambda ids: "".join(words[i] for i in ids).lstrip(), list(range(len(words))), [])


@pytest.mark.parametrize("kind", ["bytes", "broken", "newlines", "specials", "leading", "bpe", "fallback"])
def test_cost_is_linear(kind: str) -> None:
    """Tokens decoded in all, for a long answer; a decoding of everything each time would be 4 million."""
    ids, decode = {
        "bytes": (list("a中🙂 ".encode() * 200), bytes_decode),
        "broken": ([0xFF] * 2000, bytes_decode),
        "newlines": ([10] * 2000, bytes_decode),
        "specials": ([*bpe().encode("a").ids, *[0] * 2000, *bpe().encode("b").ids], bpe().decode),
        "leading": ([*[0] * 2000, *bpe().encode("b").ids], bpe().decode),
        "bpe": (bpe().encode("\n".join(LINES * 10)).ids, bpe().decode),
        "fallback": (sentencepiece().encode("中文🙂" * 200).ids, sentencepiece().decode),
    }[kind]
    decoded = 0

    def counting(window: list[int]) -> str:
        nonlocal decoded
        decoded += len(window)
        assert len(window) <= 32
        return decode(window)

    stream = TextStream(counting, ["\n###", "中中"])
    shown = "".join([stream.push(token) for token in ids]) + stream.finish()
    assert shown == decode(ids)
    assert decoded <= (20 if kind in {"bytes", "bpe", "broken"} else 150) * len(ids)


@pytest.mark.parametrize("stop", [[""], "", ["a", ""], ["a", 3], None, 7, {"a"}])
def test_bad_stops_are_refused(stop: object) -> None:
    with pytest.raises(UsageError, match="stop"):
        TextStream(bytes_decode, stop)  # type: ignore[arg-type]


def test_stops_are_normalised() -> None:
    assert [normalise_stops("ab"), normalise_stops([])] == [("ab",), ()]
    assert normalise_stops(["a", "b"]) == normalise_stops(("a", "b")) == ("a", "b")


def test_push_after_finish_is_our_fault() -> None:
    stream = TextStream(bytes_decode)
    stream.finish()
    with pytest.raises(AssertionError):
        stream.push(65)


def test_tokens_after_a_stop_are_ignored() -> None:
    stream = TextStream(bytes_decode, ["b"])
    assert [stream.push(byte) for byte in b"abc"] == ["a", "", ""]
    assert (stream.finish(), stream.text, stream.stopped) == ("", "a", "b")
