"""`longspan plan` and its kin as commands: tables, JSON, pages, pictures, and errors in a line."""

from __future__ import annotations

import json

import pytest


def test_a_plan_is_told(cli) -> None:
    code, out, err = cli("plan", "--model", "llama-3.1-70b", "--context", "1M", "--gpu", "h100", "--weights", "fp16")
    assert (code, err) == (0, "")
    assert "keys and values   327.7 GB" in out and "4.1 x 80.0 GB" in out
    assert "does not fit" in out and "What to change" in out
    assert "by benchmarks/results/attention-h100.json row" in out
    code, out, _ = cli("plan", "--model", "llama-3.1-8b", "--context", "1M", "--gpu", "h100", "--gpus", "8")
    assert "125,000 tokens, 8 compute steps, 7 passes" in out and "to spare" in out


def test_a_plan_as_json(cli) -> None:
    code, out, err = cli("plan", "--model", "qwen3-30b-a3b", "--context", "256Ki", "--gpu", "h200", "--json")
    told = json.loads(out)
    assert (code, err) == (0, "")
    assert told["context"] == 262_144 and told["kv_bytes_per_token"] == 98_304
    assert told["memory"]["kv"] == 98_304 * 262_144 and "max_context" not in told
    assert told["decode_tokens_per_s"][0] < told["decode_tokens_per_s"][1]


def test_longest_contexts(cli) -> None:
    options = ("--model", "nemotron-3-nano-30b", "--gpu", "h100", "--max-context")
    code, out, err = cli("plan", *options)
    assert (code, err) == (0, "")
    assert "superlinear" in out and "no limit" in out and "KV int4" in out
    _, out, _ = cli("plan", *options, "--json")
    found = {each["attention"]: each["longest"] for each in json.loads(out)["max_context"]}
    assert found["streaming"]["bf16"] is None and found["dense"]["int4"] > found["dense"]["bf16"] > 2_000_000


def test_a_page_and_a_picture(cli, home) -> None:
    options = ("plan", "--model", "llama-3.1-8b", "--context", "1M", "--gpu", "h100")
    code, _, err = cli(*options, "--html", "plan.html", "--out", "plan.png")
    assert code == 0 and "page: plan.html" in err and "picture: plan.png" in err
    page = (home / "plan.html").read_text(encoding="utf-8")
    assert page.count("data:image/svg+xml") == 4 and "does not fit" in page and "longspan plan" in page
    assert "http" not in page.replace("https://www.nvidia.com", ""), "nothing is loaded from anywhere"
    assert "<script" not in page
    assert (home / "plan.png").read_bytes().startswith(b"\x89PNG")
    code, _, err = cli(*options, "--html", "none/plan.html")
    assert code == 1 and err.startswith("longspan: can't write none/plan.html") and err.count("\n") == 1


@pytest.mark.parametrize(
    "options, told",
    [
        (["--context", "much"], "128Ki"), (["--gpu", "h300"], "rtx5090"), (["--model", "llama"], "llama-3.1-8b"),
        (["--network", "fast"], "8GiB"), (["--gpus", "0"], "gpus=0"), (["--kv", "fp9"], "int4"),
        (["--attention", "quadratic"], "superlinear"),
    ],
)  # fmt: skip
def test_nonsense_gets_a_line(cli, options: list[str], told: str) -> None:
    code, out, err = cli("plan", "--model", "llama-3.1-8b", "--gpu", "h100", *options)
    assert (code, out) == (2, "")
    assert told in err and err.count("\n") == 1


def test_a_folder_without_a_field(cli, home) -> None:
    (home / "own").mkdir()
    (home / "own" / "config.json").write_text('{"model_type": "llama", "hidden_size": 64, "vocab_size": 9}')
    code, _, err = cli("plan", "--model", "own", "--gpu", "h100")
    assert code == 1 and "'num_hidden_layers'" in err and err.count("\n") == 1


def test_a_decision_is_told(cli, home) -> None:
    code, out, err = cli("decide", "--model", "llama-3.1-8b", "--context", "600K", "--gpu", "h100")
    assert (code, err) == (0, "")
    assert "Next: " in out and "Out:" in out and "What would flip it:" in out and "needle-h200.json row" in out
    _, out, _ = cli("decide", "--context", "64K", "--gpu", "h100", "--json", "--html", "choice.html")
    told = json.loads(out)
    page = (home / "choice.html").read_text(encoding="utf-8")
    assert (
        "<h1>Llama-3.1-8B: dense</h1>" in page
        and "What would flip it" in page
        and "nothing may be approximated" in page
    )
    assert told["choice"]["attention"] == "dense" and told["choice"]["exact"] and told["flips"]


def test_a_tree_three_ways(cli) -> None:
    code, out, _ = cli("decide", "--gpu", "h100", "--tree")
    assert code == 0 and out.count("nothing may be approximated") == 3 and "└── " in out
    code, out, _ = cli("decide", "--gpu", "cpu", "--model", "smollm2", "--mermaid")
    assert code == 0 and out.startswith("flowchart LR")
    code, out, _ = cli("decide", "--gpu", "cpu", "--model", "smollm2", "--tree", "--json")
    assert code == 0 and json.loads(out)["then"][0]["if"].startswith("one CPU")
    code, _, err = cli("decide", "--gpu", "h100", "--tree", "--mermaid")
    assert code == 2 and err.count("\n") == 1


def test_costs_are_told(cli, home) -> None:
    code, out, err = cli("cost", "--corpus", "10M", "--per-day", "100", "--price-in", "2", "--price-out", "8")
    assert (code, err) == (0, "")
    assert (
        "$2,000" in out and "100 questions a day" in out and "Cached costs less than whole from 2 questions on." in out
    )
    options = ("cost", "--tokens", "1M", "--queries", "10", "--prices-of", "claude-sonnet-4.6")
    code, out, err = cli(*options, "--json", "--html", "cost.html", "--out", "cost.png")
    told = json.loads(out)
    assert code == 0 and [each["way"] for each in told["ways"]] == ["whole", "cached", "retrieval", "hybrid"]
    assert "prices of 2026" in told["paid"] and any("platform.claude.com" in note for note in told["notes"])
    assert (home / "cost.png").read_bytes().startswith(b"\x89PNG")
    assert (home / "cost.html").read_text(encoding="utf-8").count("data:image/svg+xml") == 2
    code, out, _ = cli("cost", "--tokens", "128K", "--gpu-hour", "2.69")
    assert code == 0 and "rented day and night" in out.lower()
    code, out, _ = cli("cost", "--tokens", "1M", "--gpu-hour", "2.69")
    assert code == 0 and "note: whole does not fit: " in out and "note: cached does not fit: " in out
    assert "retrieval does not fit" not in out and "rented" not in out.lower(), "what can't run is not recommended"


@pytest.mark.parametrize(
    "options, told",
    [
        (["--tokens", "many"], "128Ki"), (["--prices-of", "nobody"], "gpt-4.1"), (["--price-in", "-1"], "--price-in"),
        (["--gpu-hour", "-2"], "--gpu-hour"), (["--prices", "none.json"], "none.json"), (["--queries", "0"], "queries"),
        (["--corpus", "1M", "--per-day", "0"], "--per-day"), (["--gpu-hour", "1", "--gpu", "h300"], "h100"),
        (["--price-in", "1e308"], "--price-in"), (["--gpu-hour", "inf"], "--gpu-hour"),
        (["--queries", "9" * 400], "queries"), (["--answer", "9" * 400], "answer"),
    ],
)  # fmt: skip
def test_nonsense_costs_a_line(cli, options: list[str], told: str) -> None:
    code, out, err = cli("cost", *options)
    assert (code, out) == (2, "")
    assert told in err and err.count("\n") == 1
