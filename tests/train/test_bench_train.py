"""The benchmark of training: it measures real steps, and sees gradients."""

from longspan.attention import parse
from longspan.bench.train import measure
from longspan.hf.loading import load


def test_rows_are_of_real_steps(folder):
    import torch

    model = load(str(folder), device="cpu", dtype=torch.float32)
    specs = ("dense", "superlinear:window=15,spans=1")
    rows = measure(model, [parse(spec) for spec in specs], [96], 1)
    assert [(row["attention"], row["tokens"]) for row in rows] == [(spec, 96) for spec in specs]
    assert all(row["tokens_per_s"] > 0 and row["peak_bytes"] is None for row in rows)
