"""What stands against the command line from outside is told in one line."""

import tempfile

import pytest

from longspan.cli import output


def test_no_folder_for_temporary_files(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "missing")])
    monkeypatch.setattr(tempfile, "tempdir", None)
    with pytest.raises(FileNotFoundError) as caught:
        tempfile.mkstemp()
    assert output.failure(caught.value) == 1
    told = capsys.readouterr().err
    assert "set TMPDIR" in told and told.count("\n") == 1
    assert output.failure(FileNotFoundError("something else")) == 70
