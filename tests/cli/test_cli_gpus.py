"""`--gpus N`: the same answer from several processes, and a session that one process goes on with."""

import json

SUPERLINEAR = ("--attention", "superlinear:window=80,spans=2", "--max-tokens", "4")


def test_a_context_over_two_processes_is_answered_from_and_saved(cli, longspan, tiny_model, tmp_path):
    note = tmp_path / "note.txt"
    note.write_text(" ".join(f"Parcel {i} lies in hall {i * 7 % 13}." for i in range(40)))
    asked = ("ask", "Where is parcel 9?", "--model", str(tiny_model), *SUPERLINEAR, "--json", "--no-sources")
    over = longspan(*asked, "--doc", str(note), "--gpus", "2", "--session", "halls")
    assert over.returncode == 0, over.stderr
    found = json.loads(over.stdout)
    code, out, err = cli(*asked, "--session", "halls")
    assert code == 0, err
    alone = json.loads(out)
    assert alone["answer"] == found["answer"] and alone["citations"] == found["citations"]
    assert found["cached_tokens"] == 0 < alone["cached_tokens"]


def test_what_can_not_be_spread_is_refused_in_one_line(cli, tiny_model, tmp_path):
    note = tmp_path / "note.txt"
    note.write_text("Parcel 9 lies in hall 4.")
    asked = ("ask", "Where is parcel 9?", "--model", str(tiny_model), "--doc", str(note))
    for option, told in ((("--gpus", "0"), "--gpus 0"), (("--parallel", "ring"), "give --gpus N")):
        code, out, err = cli(*asked, *option)
        assert code == 2 and not out and told in err and err.count("\n") == 1
