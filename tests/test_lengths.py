"""Lengths as people write them."""

import pytest

from longspan.errors import UsageError
from longspan.lengths import bytes_of, context_of, lengths_of, seconds_of, short, tokens_of


@pytest.mark.parametrize(
    "text, tokens", [("1", 1), ("8000", 8000), ("8K", 8192), ("16k", 16384), (" 1M ", 1 << 20), ("10m", 10 << 20)]
)
def test_a_length_is_read(text, tokens):
    assert tokens_of(text) == tokens


@pytest.mark.parametrize("text", ["", " ", "K", "0", "0K", "-1", "1.5K", "1G", "8KK", "8 K", "many", "4K,8K", "²"])
def test_what_is_no_length_is_told(text):
    with pytest.raises(UsageError, match="write 8192, 8K or 1M") as caught:
        tokens_of(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", ["1025M", "99999999999M", str(2**31), "9" * 60])
def test_what_nothing_measures_is_told(text):
    with pytest.raises(UsageError, match="at most 1,024M tokens"):
        tokens_of(text)
    assert tokens_of("1024M") == 2**30


def test_lengths_keep_their_order_and_come_once():
    assert lengths_of("16K,4K, 16384,8000") == [16384, 4096, 8000]
    with pytest.raises(UsageError, match="''"):
        lengths_of("4K,,8K")


@pytest.mark.parametrize(
    "text,size",
    [
        ("1000", 1000),
        ("1B", 1),
        ("8GiB", 8 * 2**30),
        ("1.5 GB", 1_500_000_000),
        ("500mb", 500_000_000),
        ("2 KiB", 2048),
    ],
)
def test_sizes_in_bytes(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "8 Gi", "-1GiB", "0", "much", "1e400", "nan", "8GiBB"])
def test_what_is_no_size(text):
    with pytest.raises(UsageError, match="8GiB"):
        bytes_of(text)


@pytest.mark.parametrize(
    "text, tokens",
    [
        ("1", 1), ("8000", 8000), ("128K", 128_000), ("128Ki", 131_072), ("1.5M", 1_500_000), (" 1m ", 10**6),
        ("1,000,000", 10**6), ("10_000", 10_000), ("2Mi", 2**21), ("0.5 Ki", 512), ("1G", 10**9), ("1.048576M", 2**20),
    ],
)  # fmt: skip
def test_a_planned_context_is_read_in_decimal_or_binary_units(text, tokens):
    assert context_of(text) == tokens


@pytest.mark.parametrize(
    "text",
    ["", "0", "-1", "K", "1.5", "1.0001K", "1KB", "1e6", "nan", "inf", "many", "1.M", "1,00", "²", "٣", "9" * 40],
)
def test_what_is_no_context(text):
    with pytest.raises(UsageError) as caught:
        context_of(text)
    assert repr(text) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("tokens", [1, 131, 1000, 4096, 128_000, 131_072, 10**6, 2**20, 1_500_000, 10**7, 262_144, 999])
def test_a_context_is_written_as_it_is_read(tokens):
    assert context_of(short(tokens)) == tokens


def test_contexts_are_written_shortly():
    assert [short(n) for n in (131_072, 128_000, 10**6, 2**20, 1_500_000, 12_345)] == [
        "128Ki", "128K", "1M", "1Mi", "1.5M", "12.345K"
    ]  # fmt: skip


def test_a_time_is_read():
    assert [seconds_of(text) for text in ("90s", "1.5m", "12h", "7d")] == [90, 90, 43_200, 604_800]
    for text in ("", "s", "90", "0s", "-1h", "infs", "nans", "1y"):
        with pytest.raises(UsageError, match="write 90s"):
            seconds_of(text)
