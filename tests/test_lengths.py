"""Lengths as people write them."""

import pytest

from longspan.errors import UsageError
from longspan.lengths import bytes_of, lengths_of, tokens_of


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
