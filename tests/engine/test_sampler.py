"""The sampler against plain loops in float64, and against its own promises."""

import math
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from longspan.engine.sampler import Sampler, SamplingParams, distribution
from longspan.errors import ModelError, UsageError

INF = math.inf
EDGE = 1e-4  # cases nearer to a threshold than this are float32's to decide


def plain(logits: list[float], params: SamplingParams, history: list[int]) -> list[float]:
    """The definition in Python floats: penalty, temperature, top-k, min-p, top-p, each on what is left."""
    scores = list(logits)
    for i in set(history):
        penalty = params.repetition_penalty
        scores[i] = scores[i] / penalty if scores[i] > 0 else scores[i] * penalty
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    if params.temperature == 0:
        return [float(i == order[0]) for i in range(len(scores))]
    weights = [math.exp((score - scores[order[0]]) / params.temperature) for score in scores]
    kept = order[: params.top_k or None]
    assume(all(abs(weights[i] - params.min_p) > EDGE for i in kept if weights[i] < 1))
    kept = [i for i in kept if weights[i] >= params.min_p]
    total, mass, nucleus = sum(weights[i] for i in kept), 0.0, []
    for i in kept:
        nucleus.append(i)
        mass += weights[i] / total
        if params.top_p < 1:
            assume(abs(mass - params.top_p) > EDGE)
            if mass >= params.top_p:
                break
    total = sum(weights[i] for i in nucleus)
    return [weights[i] / total if i in nucleus else 0.0 for i in range(len(scores))]


# Eighths are exact in every float type here, and ties are frequent.
LOGITS = st.lists(
    st.integers(-40, 40).map(lambda n: n / 8) | st.sampled_from([-INF, 0.0]), min_size=1, max_size=40
).filter(lambda row: max(row) > -INF)
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.25, 0.7, 1.0, 1.5, 4.0]),
    top_p=st.just(1.0) | st.floats(0.01, 1.0),
    top_k=st.integers(0, 45),
    min_p=st.just(0.0) | st.floats(0.0, 1.0),
    repetition_penalty=st.sampled_from([1.0, 0.5, 2.0, 1.25]),
)


@given(LOGITS, PARAMS, st.data(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
@settings(deadline=None)
def test_distribution_equals_plain_loops(
    row: list[float], params: SamplingParams, data: st.DataObject, dtype: torch.dtype
) -> None:
    history = data.draw(st.lists(st.integers(0, len(row) - 1), max_size=8))
    logits = torch.tensor(row, dtype=dtype)
    want = plain(row, params, history)
    got = distribution(logits, params, torch.tensor(history, dtype=torch.long))
    assert got.dtype == torch.float32
    assert got.shape == logits.shape
    torch.testing.assert_close(got.double(), torch.tensor(want, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    assert [p > 0 for p in got.tolist()] == [p > 0 for p in want]
    assert logits.tolist() == torch.tensor(row, dtype=dtype).tolist(), "the caller's logits were changed"
    token = Sampler(replace(params, seed=1))(logits, torch.tensor(history, dtype=torch.long))
    assert want[token] > 0


def test_large_vocabulary_where_top_p_must_sort_everything() -> None:
    """Flat logits: the nucleus is far beyond the likeliest thousand that are looked at first."""
    logits = torch.linspace(0, 0.5, 6000)[torch.randperm(6000, generator=torch.Generator().manual_seed(0))]
    got = distribution(logits, SamplingParams(temperature=1.0, top_p=0.75))
    count = int((got > 0).sum())
    assert 1024 < count < 6000
    masses, ids = logits.double().softmax(0).sort(descending=True)
    assert set(got.nonzero().flatten().tolist()) == set(ids[:count].tolist())
    assert masses[: count - 1].sum() - 1e-6 < 0.75 < masses[:count].sum() + 1e-6
    want = masses[:count] / masses[:count].sum()
    torch.testing.assert_close(got[ids[:count]].double(), want, rtol=1e-5, atol=0)


def test_steps_in_the_documented_order() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    # After top-k 2 the first holds 4/7 = 0.571 of the mass, so a nucleus of 0.55 is it alone; before it held 0.4.
    assert distribution(logits, SamplingParams(temperature=1.0, top_k=2, top_p=0.55)).tolist() == [1, 0, 0, 0]
    # Min-p is relative to the likeliest: 0.6 * 0.4 = 0.24; then top-p sees 4/7 and 3/7.
    assert distribution(logits, SamplingParams(temperature=1.0, min_p=0.6, top_p=0.55)).tolist() == [1, 0, 0, 0]
    # Temperature comes before min-p: at 2 the ratios are square roots, sqrt(1/2) = 0.707 is in.
    kept = distribution(logits, SamplingParams(temperature=2.0, min_p=0.7)) > 0
    assert kept.tolist() == [True, True, True, False]
    # At least as likely: the edge itself is in.
    assert distribution(torch.tensor([2.0, 1.0, 2.0]), SamplingParams(temperature=1.0, min_p=1.0))[2] == 0.5


def test_ties_keep_the_lower_ids() -> None:
    logits = torch.zeros(5000)
    for params in (SamplingParams(temperature=1.0, top_k=3), SamplingParams(temperature=1.0, top_p=2.5 / 5000)):
        assert distribution(logits, params).nonzero().flatten().tolist() == [0, 1, 2]
    assert Sampler(SamplingParams())(torch.tensor([1.0, 3.0, 3.0])) == 1


def test_top_p_keeps_at_least_one() -> None:
    params = SamplingParams(temperature=1.0, top_p=1e-30)
    assert distribution(torch.tensor([0.0, 1.0, 0.5]), params).tolist() == [0, 1, 0]


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-8, 100.0])
def test_extreme_temperatures_and_logits(temperature: float) -> None:
    logits = torch.tensor([-INF, -3e38, 3e38, 1.0, 3e38])
    params = SamplingParams(temperature=temperature, top_p=0.9999999, min_p=1e-9, top_k=4)
    assert distribution(logits, params).tolist() == [0, 0, 0.5, 0, 0.5]


@pytest.mark.parametrize("penalty", [1e-300, 1e-30, 0.1, 100.0])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_penalty_stays_finite(penalty: float, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, repetition_penalty=penalty)
    row = torch.tensor([3e38, -3e38, 0.0, -INF])
    got = distribution(row, params, torch.tensor([0, 1, 2, 3, 3, 1]))
    assert math.isclose(float(got.sum()), 1.0, abs_tol=1e-6)
    assert got[3] == 0


def test_penalty_discourages_what_came_before() -> None:
    sampler = Sampler(SamplingParams(repetition_penalty=1.5))
    positive, negative = torch.tensor([2.0, 1.9]), torch.tensor([-1.0, -1.1])
    assert [sampler(positive), sampler(negative)] == [0, 0]
    seen = torch.tensor([0, 0, 0])
    assert [sampler(positive, seen), sampler(negative, seen)] == [1, 1]
    once = distribution(positive, SamplingParams(temperature=1, repetition_penalty=1.5), torch.tensor([0]))
    many = distribution(positive, SamplingParams(temperature=1, repetition_penalty=1.5), seen)
    assert once.tolist() == many.tolist()
    assert sampler(positive, torch.tensor([], dtype=torch.long)) == 0


def test_draws_follow_the_distribution() -> None:
    """Pearson's chi-square over 4000 draws; 20.5 is its 0.999 quantile at 5 degrees of freedom."""
    logits = torch.tensor([1.0, 0.5, 0.0, -0.5, -1.0, 2.0, -INF])
    params = SamplingParams(temperature=0.9, seed=7)
    sampler, draws = Sampler(params), 4000
    counts = torch.bincount(torch.tensor([sampler(logits) for _ in range(draws)]), minlength=7)
    expected = distribution(logits, params) * draws
    assert counts[6] == 0
    assert float(((counts - expected)[:6] ** 2 / expected[:6]).sum()) < 20.5


def test_same_seed_same_tokens_and_no_global_generator() -> None:
    logits = torch.zeros(1000)
    before = torch.get_rng_state()

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed))
        return [sampler(logits) for _ in range(20)]

    first = draw(3)
    torch.manual_seed(99)
    assert draw(3) == first
    assert draw(4) != first
    assert draw(2**63 - 1) != first
    torch.manual_seed(99)
    state = torch.get_rng_state()
    unseeded = draw(None)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert draw(None) != unseeded, "an unseeded sampler must not follow the global seed"
    torch.set_rng_state(before)


def test_two_samplers_do_not_disturb_each_other() -> None:
    logits, params = torch.zeros(1000), SamplingParams(temperature=1.0, seed=5)
    alone, one, other = Sampler(params), Sampler(params), Sampler(params)
    pairs = [(one(logits), other(logits)) for _ in range(10)]
    assert pairs == [(token, token) for token in (alone(logits) for _ in range(10))]


def test_greedy_needs_no_random_number_and_no_gradient() -> None:
    logits = torch.tensor([0.0, 5.0, -INF, 4.0], requires_grad=True)
    assert [Sampler(SamplingParams(seed=seed))(logits) for seed in (0, 1)] == [1, 1]
    assert not distribution(logits, SamplingParams(temperature=1.0)).requires_grad


@pytest.mark.parametrize(
    ("row", "cause"),
    [([1.0, math.nan], "NaN"), ([math.nan, INF], "NaN"), ([1.0, INF], r"\+inf"), ([-INF, -INF], "-inf.*mask")],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_of_a_broken_model(row: list[float], cause: str, temperature: float) -> None:
    with pytest.raises(ModelError, match=cause) as caught:
        Sampler(SamplingParams(temperature=temperature))(torch.tensor(row))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(), (0,), (1, 4)])
def test_logits_of_a_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="one row"):
        distribution(torch.zeros(shape), SamplingParams())


@pytest.mark.parametrize("ids", [[4], [-1]])
def test_history_outside_the_vocabulary_is_our_fault(ids: list[int]) -> None:
    with pytest.raises(AssertionError, match="history"):
        distribution(torch.zeros(4), SamplingParams(repetition_penalty=2.0), torch.tensor(ids))


BAD: dict[str, list[object]] = {
    "max_tokens": [0, -1, 1.0, True, "5", None, math.nan],
    "temperature": [-0.1, math.nan, INF, -INF, 100.5, True, "1", None, 1j],
    "top_p": [0.0, 0, -0.5, 1.01, math.nan, True, "1", None],
    "top_k": [-1, 1.0, True, False, "5", None],
    "min_p": [-0.1, 1.1, math.nan, True, False, "0", None],
    "repetition_penalty": [0.0, -1.0, math.nan, INF, 101, True, "1", None],
    "seed": [-1, 2**63, 1.0, True, "1", math.nan],
    "stop": ["", [""], ("a", ""), [3], None, 5, {"a": 1}],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_bad_parameters_are_refused(name: str, value: object) -> None:
    options: dict[str, Any] = {name: value}
    with pytest.raises(UsageError, match=name) as caught:
        SamplingParams(**options)
    message = str(caught.value)
    assert "\n" not in message
    assert "must be" in message or "give" in message
    given_value = value[-1] if isinstance(value, list | tuple) else value
    assert repr(given_value) in message


def test_good_parameters_are_normalised_and_frozen() -> None:
    params = SamplingParams(temperature=1, top_p=1, min_p=1, stop=["a", "b"])  # type: ignore[arg-type]
    assert params.stop == ("a", "b")
    assert all(type(getattr(params, name)) is float for name in ("temperature", "top_p", "min_p"))
    assert SamplingParams(stop="END").stop == ("END",)  # type: ignore[arg-type]
    assert SamplingParams() == SamplingParams(256, 0.0, 1.0, 0, 0.0, 1.0, None, ())
    assert hash(params) == hash(replace(params))
    with pytest.raises(FrozenInstanceError):
        params.top_k = 3  # type: ignore[misc]
