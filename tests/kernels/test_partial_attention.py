"""Partial attention: the reference against float64 softmax, the CPU's version against the reference, and the merge."""

import itertools
import math

import pytest
import torch

from longspan.kernels.partial_attention import cpu, cuda, merge_partials, partial_attention, reference

SIZES = [(1, 1), (1, 63), (7, 5), (64, 65), (65, 130)]


def inputs(queries, keys, group, dtype=torch.float32, batch=2, kv_heads=2, dim=17, value_dim=17, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, heads, count, size, generator=gen, dtype=torch.float64).to(dtype)
        for heads, count, size in (
            (kv_heads * group, queries, dim),
            (kv_heads, keys, dim),
            (kv_heads, keys, value_dim),
        )
    ]


def masks(queries, keys, heads, batch=2):
    """Masks of every shape that broadcasts, with rows that attend to nothing."""
    gen = torch.Generator().manual_seed(1)
    full = torch.rand(batch, heads, queries, keys, generator=gen) < 0.6
    full[:, :, ::3] = False
    return [full, full[:1], full[:, :1], full[0, 0], full[0], full[0, 0, :1], full[..., :1], full[0, 0, 0]]


def truth(q, k, v, mask, scale):
    """Softmax in float64, one query head at a time."""
    batch, heads, queries, _ = q.shape
    group = heads // k.shape[1]
    seen = torch.ones(batch, heads, queries, k.shape[2], dtype=torch.bool)
    seen = seen if mask is None else seen & mask
    out = torch.full((batch, heads, queries, v.shape[-1]), float("nan"), dtype=torch.float64)
    lse = torch.full((batch, heads, queries), float("nan"), dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for t in range(queries):
                at = seen[b, h, t].nonzero().squeeze(1)
                scores = k[b, h // group, at].double() @ q[b, h, t].double() * scale
                weights = torch.softmax(scores, 0)
                out[b, h, t] = weights @ v[b, h // group, at].double()
                lse[b, h, t] = math.log(scores.exp().sum()) if len(at) else -math.inf
    return out, lse


def close(found, expected, tolerance):
    torch.testing.assert_close(found[0].double(), expected[0].double(), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(found[1].double(), expected[1].double(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("group", [1, 3, 16])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
def test_the_reference_is_softmax(group, dtype, tolerance):
    # Inputs are rounded before both; bfloat16 is computed in float32.
    q, k, v = inputs(5, 13, group, dtype, value_dim=11)
    for mask in (None, *masks(5, 13, 2 * group)):
        out, lse = reference.partial_attention(q, k, v, mask, scale=0.3)
        assert out.dtype == lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        close((out, lse), truth(q, k, v, mask, 0.3), tolerance)


@pytest.mark.parametrize("group", [1, 3, 16])
@pytest.mark.parametrize("queries,keys", SIZES)
@pytest.mark.parametrize("dim", [1, 16, 17])
def test_the_cpu_version_equals_the_reference(group, queries, keys, dim):
    q, k, v = inputs(queries, keys, group, dim=dim, value_dim=dim)
    with torch.inference_mode():
        assert cpu.serves(q, k, v), "this test would compare the reference with itself"
        for mask in (None, *masks(queries, keys, 2 * group)):
            expected = reference.partial_attention(q, k, v, mask, scale=dim**-0.5)
            close(cpu.partial_attention(q, k, v, mask, scale=dim**-0.5), expected, 2e-6)
            close(partial_attention(q, k, v, mask, scale=dim**-0.5), expected, 2e-6)


@pytest.mark.parametrize("version", [reference, cpu])
def test_great_scores_do_not_overflow(version):
    q, k, v = inputs(9, 33, 3)
    with torch.inference_mode():
        for mask in (None, masks(9, 33, 6)[0]):
            expected = truth(100 * q, 100 * k, v, mask, 1.0 / 500)
            found = version.partial_attention(100 * q, 100 * k, v, mask, scale=1.0 / 500)
            close(found, expected, 1e-4)
            found = version.partial_attention(100 * q, 100 * k, v, mask, scale=1.0)
            assert found[0].isfinite().all()


@pytest.mark.parametrize("version", [reference, cpu])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["k", "v", "both"])
def test_what_is_masked_changes_nothing(version, bad, where):
    q, k, v = inputs(7, 65, 3)
    mask = masks(7, 65, 6)[0].clone()
    mask[..., 10:20] = False
    with torch.inference_mode():
        clean = version.partial_attention(q, k, v, mask, scale=0.25)
        assert clean[0].isfinite().all()
        if where != "v":
            k[:, :, 10:20] = bad
        if where != "k":
            v[:, :, 10:20] = bad
        close(version.partial_attention(q, k, v, mask, scale=0.25), clean, 2e-6)


@pytest.mark.parametrize("version", [reference, cpu])
@pytest.mark.parametrize("where", ["k", "v"])
@pytest.mark.parametrize("masked", [False, True])
def test_nan_that_is_attended_to_shows(version, where, masked):
    q, k, v = inputs(7, 65, 3)
    (k if where == "k" else v)[0, 1, 12] = float("nan")
    mask = None
    if masked:
        mask = torch.ones(7, 65, dtype=torch.bool)
        mask[:4, 12] = False
    with torch.inference_mode():
        out, _ = version.partial_attention(q, k, v, mask, scale=0.25)
    spoilt = torch.zeros(2, 6, 7, dtype=torch.bool)
    spoilt[0, 3:, 4 if masked else 0 :] = True
    assert torch.equal(out.isnan().any(-1), spoilt)


@pytest.mark.parametrize("version", [reference, cpu])
def test_a_query_without_keys_gives_nothing(version):
    q, k, v = inputs(4, 9, 3)
    mask = torch.zeros(4, 9, dtype=torch.bool)
    mask[2, 3] = True
    with torch.inference_mode():
        out, lse = version.partial_attention(q, k, v, mask, scale=1.0)
    assert (out[:, :, [0, 1, 3]] == 0).all()
    assert (lse[:, :, [0, 1, 3]] == float("-inf")).all()
    torch.testing.assert_close(out[:, :, 2], v[:, :, 3].repeat_interleave(3, 1))


def test_a_part_without_keys_gives_nothing():
    q, k, v = inputs(4, 0, 3)
    with torch.inference_mode():
        out, lse = partial_attention(q, k, v, scale=1.0)
    assert out.shape == q.shape and (out == 0).all()
    assert (lse == float("-inf")).all()


def test_gradients_flow_where_they_are_wanted():
    q, k, v = inputs(5, 9, 3)
    v.requires_grad_()
    out, _ = partial_attention(q, k, v, scale=0.25)
    out.sum().backward()
    # Weights of one query sum to 1, whatever they are: so do the gradients of 5 queries of 3 heads.
    torch.testing.assert_close(v.grad[..., 0].sum(-1), torch.full((2, 2), 15.0))


@pytest.mark.parametrize("group", [1, 3])
def test_merged_parts_are_softmax_over_their_union(group):
    q, k, v = inputs(7, 50, group, torch.float64)
    mask = masks(7, 50, 2 * group)[0]
    cuts = [0, 1, 1, 20, 50]  # one part has a single key, one has none
    parts = [
        reference.partial_attention(q, k[:, :, a:b], v[:, :, a:b], mask[..., a:b], scale=0.3)
        for a, b in itertools.pairwise(cuts)
    ]
    outs, lses = (torch.stack(side) for side in zip(*parts, strict=True))
    close(merge_partials(outs, lses), truth(q, k, v, mask, 0.3), 1e-12)
    # The order of the parts is of no matter, nor whether they are merged at once.
    close(merge_partials(outs.flip(0), lses.flip(0)), truth(q, k, v, mask, 0.3), 1e-12)
    first = merge_partials(outs[:2], lses[:2])
    rest = merge_partials(outs[2:], lses[2:])
    twice = merge_partials(torch.stack([first[0], rest[0]]), torch.stack([first[1], rest[1]]))
    close(twice, truth(q, k, v, mask, 0.3), 1e-12)


def test_a_part_that_weighs_nothing_may_hold_anything():
    outs = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    lses = torch.tensor([[0.5] * 4, [float("-inf")] * 4, [1.5] * 4])
    expected = merge_partials(outs[[0, 2]], lses[[0, 2]])
    for bad in (float("nan"), float("inf")):
        outs[1] = bad
        close(merge_partials(outs, lses), expected, 1e-6)
    out, lse = merge_partials(outs[1:2], lses[1:2])
    assert (out == 0).all() and (lse == float("-inf")).all()


def test_nan_in_a_part_that_weighs_something_shows():
    outs, lses = torch.zeros(2, 3, 4), torch.zeros(2, 3)
    outs[1, 1] = float("nan")
    out, _ = merge_partials(outs, lses)
    assert torch.equal(out.isnan().any(-1), torch.tensor([False, True, False]))
    lses[0, 2] = float("nan")
    assert merge_partials(outs, lses)[0].isnan().any(-1).tolist() == [False, True, True]


# --- fused kernels on a GPU -------------------------------------------------------------------------------------------

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
FUSED = [(torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)]
"""Types of keys and values, and how far rounding queries and results to them may move an output."""


def gpu_inputs(queries, keys, group, dtype, dim, batch=2):
    q, k, v = (x.cuda() for x in inputs(queries, keys, group, dim=dim, value_dim=dim, batch=batch))
    return q, k.to(dtype), v.to(dtype)


@ON_GPU
@pytest.mark.parametrize("dtype,tolerance", FUSED)
@pytest.mark.parametrize("group", [1, 3, 16])
@pytest.mark.parametrize("queries,keys", [(70, 1), (65, 63), (129, 65), (300, 1030)])
@pytest.mark.parametrize("dim,batch", [(64, 1), (64, 2), (128, 1), (8, 2)])
def test_the_fused_kernels_equal_the_reference(dtype, tolerance, group, queries, keys, dim, batch):
    q, k, v = gpu_inputs(queries, keys, group, dtype, dim, batch)
    with torch.inference_mode():
        assert cuda.serves(q, k, v), "this test would compare the reference with itself"
        for mask in (None, *(mask.cuda() for mask in masks(queries, keys, 2 * group, batch))):
            expected = reference.partial_attention(q, k, v, mask, scale=dim**-0.5)
            found = cuda.partial_attention(q, k, v, mask, scale=dim**-0.5)
            assert [x.dtype for x in found] == [torch.float32] * 2
            close(found, expected, tolerance)
            close(partial_attention(q, k, v, mask, scale=dim**-0.5), expected, tolerance)


@ON_GPU
@pytest.mark.parametrize("dtype,tolerance", FUSED)
def test_the_fused_kernels_attend_causally_in_tiles(dtype, tolerance):
    """Whole blocks of a row are masked first: a running maximum must bear that."""
    q, k, v = gpu_inputs(512, 2048, 3, dtype, 64, 1)
    row, column = torch.arange(512, device="cuda")[:, None], torch.arange(2048, device="cuda")
    with torch.inference_mode():
        for mask in (column <= row + 1536, column <= row, column >= 2000 - row):
            expected = reference.partial_attention(q, k, v, mask, scale=0.125)
            close(cuda.partial_attention(q, k, v, mask, scale=0.125), expected, tolerance)


@ON_GPU
@pytest.mark.parametrize("dtype,tolerance", FUSED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_masked_changes_nothing_on_a_gpu(dtype, tolerance, bad):
    q, k, v = gpu_inputs(70, 65, 3, dtype, 64)
    mask = masks(70, 65, 6)[0].cuda()
    mask[..., 10:20] = False
    with torch.inference_mode():
        clean = cuda.partial_attention(q, k, v, mask, scale=0.25)
        assert clean[0].isfinite().all() and (clean[0][:, :, ::3] == 0).all()
        assert (clean[1][:, :, ::3] == float("-inf")).all()
        k[:, :, 10:20] = v[:, :, 10:20] = bad
        close(cuda.partial_attention(q, k, v, mask, scale=0.25), clean, tolerance)


@ON_GPU
@pytest.mark.parametrize("masked", [False, True])
def test_nan_that_is_attended_to_shows_on_a_gpu(masked):
    q, k, v = gpu_inputs(70, 65, 3, torch.float32, 64)
    v[0, 1, 12] = float("nan")
    mask = None
    if masked:
        mask = torch.ones(70, 65, dtype=torch.bool, device="cuda")
        mask[:4, 12] = False
    with torch.inference_mode():
        out, _ = cuda.partial_attention(q, k, v, mask, scale=0.25)
    spoilt = torch.zeros(2, 6, 70, dtype=torch.bool)
    spoilt[0, 3:, 4 if masked else 0 :] = True
    assert torch.equal(out.isnan().any(-1).cpu(), spoilt)


@ON_GPU
def test_the_fused_kernels_write_no_scores():
    q, k, v = gpu_inputs(2048, 65536, 3, torch.float32, 64, 1)
    with torch.inference_mode():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        partial_attention(q, k, v, scale=0.125)
        assert torch.cuda.max_memory_allocated() - before < 6 * 2048 * 65536, "scores would take 3.2 GB"


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("dtype,tolerance", FUSED)
def test_heads_masks_and_padding_are_laid_out_for_the_kernels(monkeypatch, batch, group, dtype, tolerance):
    """The kernels themselves need a GPU; what they are given, and what is made of it, is the same with these."""

    def efficient(q, k, v, bias, wants_lse, dropout, causal, *, scale):
        assert wants_lse and not dropout and not causal and q.dtype == k.dtype == v.dtype == dtype
        assert q.shape[:2] == k.shape[:2] == v.shape[:2] and q.stride(-1) == k.stride(-1) == 1
        scores = q.float() @ k.float().transpose(-1, -2) * scale
        if bias is not None:
            assert bias.shape == scores.shape and bias.dtype == dtype and bias.stride(-1) == 1
            assert all(stride % 8 == 0 for stride in bias.stride()[:-1])
            scores = scores + bias
        lse = torch.logsumexp(scores, -1)
        padded = torch.full((*lse.shape[:2], -(-lse.shape[2] // 32) * 32), float("nan"))
        padded[..., : lse.shape[2]] = lse
        return (scores.softmax(-1) @ v.float()).to(dtype), padded, None, None

    def flash(q, k, v, dropout, causal, *, scale):
        assert dtype != torch.float32
        out, lse, *_ = efficient(q, k, v, None, True, dropout, causal, scale=scale)
        return out, lse[..., : q.shape[2]], None

    monkeypatch.setattr(cuda, "_EFFICIENT", efficient)
    monkeypatch.setattr(cuda, "_FLASH", flash)
    q, k, v = inputs(33, 29, group, dim=16, value_dim=16, batch=batch)
    k, v = k.to(dtype), v.to(dtype)
    assert cuda._fits(q, k, v) and not cuda.serves(q, k, v), "not on a CPU"
    for mask in (None, *masks(33, 29, 2 * group, batch)):
        expected = reference.partial_attention(q, k, v, mask, scale=0.3)
        close(cuda.partial_attention(q, k, v, mask, scale=0.3), expected, tolerance)
