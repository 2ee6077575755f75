"""What a decode step does with a new token, and with all keys: kernels in Triton's interpreter beside plain PyTorch."""

import functools

import pytest
import torch

from longspan.kernels import append as append_room
from longspan.kernels import dense_decode
from longspan.kernels.append import Place, reference
from longspan.kernels.dense_decode import reference as dense_reference
from longspan.kernels.held import PAGE, Held
from longspan.kernels.partial_attention.reference import merge_partials
from longspan.kv.rotary import Rotary

append_kernels = pytest.importorskip("longspan.kernels.append.triton_kernels")
dense_kernels = pytest.importorskip("longspan.kernels.dense_decode.triton_kernels")


def pages(kv_heads, slots, dim, dtype):
    return torch.full((kv_heads, slots, PAGE, dim), float("nan"), dtype=dtype)


@pytest.mark.parametrize("lengths", [[0], [63, 64], [200]])
@pytest.mark.parametrize("rotary,norms", [(0, False), (8, False), (6, True), (8, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_new_token_is_kept_where_it_stands(lengths, rotary, norms, dtype):
    torch.manual_seed(0)
    kv_heads, group, dim, slots, batch = 2, 3, 8, 9, len(lengths)
    rows = torch.randn(batch, (group + 2) * kv_heads * dim, dtype=dtype)
    table = torch.randperm(slots)[: 4 * batch].view(batch, 4)
    per_token = torch.rand(rotary // 2, dtype=torch.float64) if rotary else None
    weights = torch.rand(2, dim, dtype=dtype) + 0.5 if norms else (None, None)
    found = []
    for version in (append_kernels.append, reference.append, append_room.append):
        rotated = torch.full((batch, kv_heads, 256, dim), float("nan"), dtype=dtype) if rotary else None
        place = Place(pages(kv_heads, slots, dim, dtype), pages(kv_heads, slots, dim, dtype), table, rotated, per_token)
        q = version(rows, place, torch.tensor(lengths), q_weight=weights[0], k_weight=weights[1], eps=1e-6)
        found.append((q, place.keys, place.values, *([] if rotated is None else [rotated])))
    for kernel, plain, chosen in zip(*found, strict=True):
        torch.testing.assert_close(kernel, plain, equal_nan=True, atol=2e-3 if dtype == torch.float16 else 1e-6, rtol=0)
        torch.testing.assert_close(chosen, plain, equal_nan=True, atol=0, rtol=0)
    _, keys, values, *rotated = found[1]
    assert int((~keys.isnan()).sum()) == int((~values.isnan()).sum()) == batch * kv_heads * dim
    for b, n in enumerate(lengths):
        heads = rows[b].view(-1, dim)
        torch.testing.assert_close(values[:, table[b, n // PAGE], n % PAGE], heads[-kv_heads:])
        if rotated:
            turn = Rotary(per_token * 2 * torch.pi)
            expected = turn(keys[:, table[b, n // PAGE], n % PAGE].unsqueeze(1), torch.tensor([n])).squeeze(1)
            torch.testing.assert_close(
                rotated[0][b, :, n], expected, atol=2e-3 if dtype == torch.float16 else 1e-5, rtol=0
            )


@pytest.mark.parametrize("splits", [1, 4, None])
def test_parts_of_a_sequence_merge_into_the_whole(splits):
    torch.manual_seed(1)
    q, k, v = torch.randn(2, 6, 16), torch.randn(2, 2, 90, 16), torch.randn(2, 2, 90, 24)
    k[:, :, 70:], v[:, :, 70:] = float("nan"), float("nan")
    counts = [torch.tensor([30, 0]), torch.tensor([40, 7])]
    parts = [(Held(k[:, :, :30]), Held(v[:, :, :30])), (Held(k[:, :, 30:]), Held(v[:, :, 30:]))]
    whole = Held(torch.cat([k[:1, :, :70], torch.nn.functional.pad(k[1:, :, 30:37], (0, 0, 0, 63))]))
    values = Held(torch.cat([v[:1, :, :70], torch.nn.functional.pad(v[1:, :, 30:37], (0, 0, 0, 63))]))
    wanted = dense_reference.decode(q.double(), whole, values, counts[0] + counts[1], scale=0.3)
    for version in (
        dense_reference.partial,
        dense_decode.partial,
        functools.partial(dense_kernels.partial, splits=splits),
    ):
        found = [version(q, *held, count, scale=0.3) for held, count in zip(parts, counts, strict=True)]
        assert found[0][1][1].tolist() == [-float("inf")] * 6, "no keys weigh nothing"
        out, _ = merge_partials(*(torch.stack(each) for each in zip(*found, strict=True)))
        torch.testing.assert_close(out.double(), wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("lengths", [[1], [63, 257], [64, 1]])
@pytest.mark.parametrize("group,dim,rotary", [(1, 16, 0), (3, 20, 8), (16, 32, 32)])
@pytest.mark.parametrize("splits", [1, 4, None])
def test_dense_decode_reads_every_key_once(lengths, group, dim, rotary, splits):
    torch.manual_seed(0)
    kv_heads, batch, dtype = 2, len(lengths), torch.float32
    k, v = pages(kv_heads, 12, dim, dtype), pages(kv_heads, 12, dim, dtype)
    table = torch.randperm(12)[: 6 * batch].view(batch, 6)
    for b, n in enumerate(lengths):
        for i in range(-(-n // PAGE)):
            rows = min(PAGE, n - i * PAGE)
            for held in (k, v):
                held[:, table[b, i], :rows] = torch.randn(kv_heads, rows, dim)
    q = torch.randn(batch, kv_heads * group, dim)
    per_token = torch.rand(rotary // 2, dtype=torch.float64) if rotary else None
    held, given = (Held(k, table), Held(v, table), torch.tensor(lengths)), {"scale": 0.3, "per_token": per_token}
    found = dense_kernels.decode(q, *held, **given, splits=splits)
    wanted = dense_reference.decode(q.double(), *held, **given)
    torch.testing.assert_close(found.double(), wanted, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(dense_decode.decode(q, *held, **given).double(), wanted, atol=2e-6, rtol=1e-5)
    n, head = lengths[-1], group
    query = q[-1, head] if per_token is None else Rotary(per_token * 2 * torch.pi)(q[-1, head], torch.tensor(n - 1))
    keys, values = held[0].gathered(batch - 1, n)[1], held[1].gathered(batch - 1, n)[1]
    by_hand = torch.softmax(keys.double() @ query.double() * 0.3, 0) @ values.double()
    torch.testing.assert_close(found[-1, head].double(), by_hand, atol=1e-5, rtol=1e-5)
