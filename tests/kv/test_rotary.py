"""Rotation on reading: the models' own, at any position, and relative only."""

import math
from decimal import Decimal, getcontext

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from longspan.kv.rotary import Rotary

PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899")
FREQUENCIES = 1.0 / 10000.0 ** (torch.arange(0, 16, 2, dtype=torch.float64) / 16)


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_equals_the_models_own_rotation(rope):
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=16, rope_parameters=rope)
    theirs = LlamaRotaryEmbedding(config)
    positions = torch.tensor([0, 1, 2, 5, 63, 64, 500, 2047])
    q, k = numbers(1, 4, 8, 16, dtype=torch.float32), numbers(1, 2, 8, 16, seed=1, dtype=torch.float32)
    cos, sin = theirs(q, position_ids=positions.unsqueeze(0))
    expected_q, expected_k = apply_rotary_pos_emb(q, k, cos, sin)
    ours = Rotary(theirs.inv_freq)
    assert ours.dim == 16
    # Their angles are float32: at position 2047 they are off by up to 2047 * 6e-8.
    torch.testing.assert_close(ours(q, positions), expected_q, atol=5e-4, rtol=0)
    torch.testing.assert_close(ours(k, positions), expected_k, atol=5e-4, rtol=0)


def test_rotations_compose():
    rotary, x = Rotary(FREQUENCIES), numbers(3, 5, 16)
    first, second = torch.tensor([0, 1, 7, 100, 4000]), torch.tensor([3, 0, 11, 9999, 6000])
    torch.testing.assert_close(rotary(rotary(x, first), second), rotary(x, first + second), atol=1e-10, rtol=0)
    torch.testing.assert_close(rotary(rotary(x, first), -first), x, atol=1e-10, rtol=0)
    torch.testing.assert_close(rotary(x, torch.zeros(5, dtype=torch.int64)), x, atol=0, rtol=0)


@pytest.mark.parametrize("shift", [1, 63, 123_456, 9_000_000])
def test_only_the_difference_of_positions_enters_a_score(shift):
    rotary, q, k = Rotary(FREQUENCIES), numbers(6, 16), numbers(6, 16, seed=1)
    at, held = torch.tensor([9, 10, 40, 41, 500, 900]), torch.tensor([0, 10, 3, 2, 499, 1])

    def scores(by):
        return (rotary(q, at + by) * rotary(k, held + by)).sum(-1)

    torch.testing.assert_close(scores(shift), scores(0), atol=1e-7, rtol=0)
    assert not torch.allclose((rotary(q, at + 1) * rotary(k, held)).sum(-1), scores(0), atol=1e-3)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-8), (torch.float32, 1e-6)])
@pytest.mark.parametrize("position", [10_000_000, 20_000_001])  # the second is no float32
def test_exact_at_position_ten_million(dtype, tolerance, position):
    getcontext().prec = 60
    x = numbers(1, 16, dtype=dtype)
    expected = torch.empty(16, dtype=torch.float64)
    for i, frequency in enumerate(FREQUENCIES.tolist()):
        angle = float(Decimal(position) * Decimal(frequency) % (2 * PI))
        a, b = float(x[0, i]), float(x[0, i + 8])
        expected[i] = a * math.cos(angle) - b * math.sin(angle)
        expected[i + 8] = b * math.cos(angle) + a * math.sin(angle)
    for out in (Rotary(FREQUENCIES)(x, torch.tensor([position])), Rotary(FREQUENCIES).range(x, position)):
        assert out.dtype == dtype
        torch.testing.assert_close(out[0].double(), expected, atol=tolerance, rtol=0)


def test_partial_rotation_leaves_the_other_channels():
    rotary, x = Rotary(FREQUENCIES[:3]), numbers(2, 7, 16)
    positions = torch.arange(7) * 13
    out = rotary(x, positions)
    assert rotary.dim == 6
    assert torch.equal(out[..., 6:], x[..., 6:])
    assert torch.equal(out[..., :6], rotary(x[..., :6], positions))
    assert not torch.isclose(out[:, 1:, :6], x[:, 1:, :6]).all(-1).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_range_equals_its_positions_however_often_it_is_asked_for(dtype):
    rotary = Rotary(FREQUENCIES)
    # More ranges than are kept, the first asked for again at the end.
    for start, count in [(0, 5), (5, 1), (7, 64), (3, 2), (9, 9), (10, 9), (11, 9), (12, 9), (13, 9), (14, 9), (0, 5)]:
        x = numbers(2, count, 16, seed=start, dtype=dtype)
        out = rotary.range(x, start)
        assert out.dtype == dtype
        assert torch.equal(out, rotary(x, torch.arange(start, start + count)))
    # The same range in another type must not get the other's rounding.
    assert torch.equal(rotary.range(numbers(5, 16), 0), rotary(numbers(5, 16), torch.arange(5)))


def test_positions_broadcast_over_heads():
    rotary, x = Rotary(FREQUENCIES), numbers(2, 3, 4, 16)
    positions = torch.randint(0, 5000, (2, 3, 4), generator=torch.Generator().manual_seed(0))
    out = rotary(x, positions)
    for b in range(2):
        for h in range(3):
            assert torch.equal(out[b, h], rotary(x[b, h], positions[b, h]))
