"""A journal keeps every whole row, whatever cut the last one short, and touches no file that is not its own."""

import json

import pytest

from longspan.errors import SaveError, UsageError
from longspan.evals.journal import Entry, Journal, merged, read

HERE = {"device": "one", "threads": 1, "command": "first"}
THERE = {"device": "two", "threads": 1, "command": "second", "model": "tiny"}
ROWS = [
    {"question": 0, "answer": "пирс 12"},
    {"question": 1, "answer": 'a\n"b"\r\u2028'},
    {"question": 2, "answer": ""},
]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "rows.jsonl"


def write(file, environment=HERE, rows=ROWS):
    with Journal(file) as journal:
        journal.begin(environment)
        for row in rows:
            journal.append(row)


def test_rows_come_back_with_their_environment(file):
    write(file, HERE, ROWS[:2])
    write(file, THERE, ROWS[2:])
    assert read(file) == [Entry(ROWS[0], HERE), Entry(ROWS[1], HERE), Entry(ROWS[2], THERE)]
    lines = file.read_text(encoding="utf-8").split("\n")
    assert [set(json.loads(line)) == {"environment"} for line in lines[:-1]] == [True, False, False, True, False]
    assert lines[-1] == "" and "пирс" in lines[1], "a line a row, to be read by people too"


def test_a_row_is_in_the_file_at_once(file):
    with Journal(file) as journal:
        journal.begin(HERE)
        assert read(file) == []
        for count, row in enumerate(ROWS, 1):
            journal.append(row)
            assert [entry.row for entry in read(file)] == ROWS[:count]


def test_a_line_cut_short_is_left_out_and_cut_off(file):
    write(file)
    data = file.read_bytes()
    last = data.rstrip(b"\n").rfind(b"\n") + 1
    for size in range(last, len(data)):
        file.write_bytes(data[:size])
        # The bracket that ends an object is its last byte: only the end of the line is missing then.
        kept = ROWS if size == len(data) - 1 else ROWS[:2]
        assert [entry.row for entry in read(file)] == kept, size
        with Journal(file) as journal:
            assert [entry.row for entry in journal.entries] == kept, size
            journal.begin(THERE)
            journal.append({"question": 9})
        assert [entry.row for entry in read(file)] == [*kept, {"question": 9}], size
        assert read(file)[-1].environment == THERE


def test_zeros_that_a_power_cut_left_are_cut_off(file):
    write(file)
    with file.open("ab") as stream:
        stream.write(b"\0" * 100)
    with Journal(file) as journal:
        assert [entry.row for entry in journal.entries] == ROWS
    assert b"\0" not in file.read_bytes()


def test_a_first_line_cut_short_counts_as_nothing(file):
    write(file, rows=[])
    data = file.read_bytes()
    for size in range(len(data) - 1):
        file.write_bytes(data[:size])
        write(file)
        assert [entry.row for entry in read(file)] == ROWS


@pytest.mark.parametrize(
    "data",
    [
        b"notes",
        b"notes\n",
        b"a\nb\n",
        b"[1]\n",
        b'{"question": 0}\n',
        b'{"environment": {}, "x": 1}\n',
        b"\n",
        b"\xff\0\n",
    ],
)
def test_a_file_that_is_no_journal_is_refused_and_untouched(file, data):
    file.write_bytes(data)
    for use in (read, Journal):
        with pytest.raises(UsageError, match=r"rows\.jsonl is no journal"):
            use(file)
    assert file.read_bytes() == data
    assert list(file.parent.iterdir()) == [file]


def test_a_broken_line_in_the_middle_is_named(file):
    write(file)
    lines = file.read_bytes().splitlines(keepends=True)
    data = b"".join([*lines[:2], b'{"question": 1, \n', *lines[2:]])
    file.write_bytes(data)
    for use in (read, Journal):
        with pytest.raises(UsageError, match=r"rows\.jsonl, line 3 "):
            use(file)
    assert file.read_bytes() == data


def test_one_run_at_a_time_writes(file):
    with Journal(file) as journal:
        journal.begin(HERE)
        with pytest.raises(UsageError, match="another run writes"):
            Journal(file)
        journal.append(ROWS[0])
    with Journal(file) as journal:
        assert [entry.row for entry in journal.entries] == ROWS[:1]
    assert list(file.parent.iterdir()) == [file], "no lock file stays"


def test_places_that_cannot_be_written_or_read_are_told(tmp_path):
    for file in (tmp_path, tmp_path / "none" / "rows.jsonl"):
        with pytest.raises(UsageError, match="can't write"):
            Journal(file)
        with pytest.raises(UsageError, match="can't read"):
            read(file)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told(file, monkeypatch):
    from longspan.evals import journal as module

    def full(_):
        raise OSError(28, "No space left on device")

    with Journal(file) as journal:
        journal.begin(HERE)
        monkeypatch.setattr(module.os, "fsync", full)
        with pytest.raises(SaveError, match="No space left"):
            journal.append(ROWS[0])
        assert journal.entries == [], "a row that may not be kept does not count"


def test_without_a_file_rows_are_kept_in_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(None)
    with Journal(None) as journal:
        assert journal.entries == []
        journal.begin(HERE)
        journal.append(ROWS[0])
        assert journal.entries == [Entry(ROWS[0], HERE)]
    assert list(tmp_path.iterdir()) == []


def test_a_stray_byte_in_an_argument_is_kept(file):
    environment = {"command": "--out caf\udce9.jsonl"}
    write(file, environment)
    assert read(file)[0].environment == environment


def test_merged_says_where_every_row_was_measured():
    entries = [Entry(ROWS[0], HERE), Entry(ROWS[1], THERE), Entry(ROWS[2], dict(HERE))]
    assert merged(entries) == {
        "device": "one; two",
        "threads": 1,
        "command": "first; second",
        "model": "tiny",
        "runs": [HERE, THERE],
        "rows": [{**ROWS[0], "run": 0}, {**ROWS[1], "run": 1}, {**ROWS[2], "run": 0}],
    }
    assert merged(entries[:1]) == {**HERE, "runs": [HERE], "rows": [{**ROWS[0], "run": 0}]}
