"""The public surface, pinned: names, mechanisms, what they say of themselves, and how fast the package is imported."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import longspan
from longspan.attention import Shape, make, mechanisms, names, parse, register
from longspan.errors import LongspanError, UnknownNameError, UsageError

EVICTING = ["h2o", "snapkv", "rocketkv", "expected", "keydiff", "kvzip"]
MECHANISMS = [
    "dense", "streaming", "sparse", "superlinear", "quest", "sparq", "tree", "infini", *EVICTING, "retrieval",
    "xattention",
]  # fmt: skip
SHAPES = [Shape(32, 2, 128, 128), Shape(9, 3, 64, 64, 4.0), Shape(1, 1, 8, 16, 0.5)]
VARIANTS = [
    *MECHANISMS,
    "streaming:window=1,sinks=0",
    "superlinear:summary=bounds,gate=routed,power=0.55,span_power=0.55",
    "superlinear:spans=0",
    "superlinear:sinks=4",
    "retrieval:read=place,pages=64,lexical=false",
    "quest:budget=512,who=layer,dense_layers=0",
    "sparq:budget=512,channels=8,block=1",
    "tree:beam=2,leaves=4,who=model,coarse=false",
    "sparse:density=2.0,sinks=0",
    "xattention:threshold=0.5",
    "infini:segment=64,rule=linear,beta=-1.5",
    "h2o:budget=512,window=256,heads=adaptive,safeguard=0.5,every=64",
    "snapkv:budget=512,every=1024,kernel=5,sinks=0",
    "rocketkv:budget=512,every=256",
    "expected:future=128,epsilon=0.02",
]


def test_the_public_names():
    assert longspan.__all__ == [
        "LLM",
        "LongspanError",
        "Mechanism",
        "SamplingParams",
        "Session",
        "__version__",
        "attend",
        "mechanisms",
        "plan",
    ]
    for name in longspan.__all__:
        assert getattr(longspan, name) is not None
    assert dir(longspan) == sorted(longspan.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Transformer'"):
        longspan.Transformer  # noqa: B018


def test_public_names_are_those_of_their_homes():
    from longspan.attention import Mechanism, attend
    from longspan.engine.llm import LLM
    from longspan.engine.sampler import SamplingParams
    from longspan.sessions.session import Session

    assert longspan.LLM is LLM and longspan.Session is Session and longspan.SamplingParams is SamplingParams
    assert longspan.attend is attend and longspan.Mechanism is Mechanism and longspan.mechanisms is mechanisms
    assert longspan.LongspanError is LongspanError


def test_importing_the_package_does_not_import_torch():
    code = (
        "import sys, longspan, longspan.errors, longspan.settings; "
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_mechanisms():
    assert names() == MECHANISMS
    assert list(mechanisms()) == MECHANISMS
    assert list(longspan.mechanisms()) == MECHANISMS
    assert [name for name, cls in mechanisms().items() if cls.exact] == ["dense"]
    assert [name for name, cls in mechanisms().items() if cls.bounded_memory] == [
        "streaming",
        "infini",
        *(name for name in EVICTING if name != "rocketkv"),
    ]
    assert [name for name, cls in mechanisms().items() if cls.evicts] == EVICTING
    assert [name for name, cls in mechanisms().items() if cls.needs_training] == ["infini"]
    assert [name for name, cls in mechanisms().items() if not cls.beyond_window] == ["dense", "xattention"]
    assert [name for name, cls in mechanisms().items() if cls.prefill_only] == ["xattention"]
    assert [name for name, cls in mechanisms().items() if cls.adapts] == ["tree"]
    for name, cls in mechanisms().items():
        assert cls.name == name
        assert cls.about and "arXiv" in cls.source and cls.decode_order and cls.__doc__
        assert make(name).options() == cls.options()


def test_a_name_is_registered_once():
    with pytest.raises(UsageError, match="already"):
        register("dense", "longspan.attention.dense:Dense")
    assert names() == MECHANISMS


@pytest.mark.parametrize("spec", ["quadratic", "", "Dense", "quadratic:window=3", " dense2"])
def test_an_unknown_mechanism_lists_the_known_ones(spec):
    with pytest.raises(UnknownNameError) as caught:
        parse(spec)
    assert all(name in str(caught.value) for name in MECHANISMS)


@pytest.mark.parametrize("name", MECHANISMS)
def test_an_unknown_option_lists_the_known_ones(name):
    known = mechanisms()[name].options()
    for call in (lambda: parse(f"{name}:windows=3"), lambda: make(name, windows=3)):
        with pytest.raises(UnknownNameError, match="windows") as caught:
            call()
        assert all(option in str(caught.value) for option in known)
        assert known or "none" in str(caught.value)


@pytest.mark.parametrize(
    "spec",
    [
        "streaming:window", "streaming:window=", "streaming:=3", "streaming:window=3,window=4", "streaming:window=x",
        "streaming:window=1.5", "streaming:window=0", "streaming:sinks=-1", "superlinear:gate=soft",
        "superlinear:power=0", "superlinear:power=nan", "superlinear:power=1.5", "superlinear:backward=-1",
        "superlinear:backward=nan", "superlinear:summary=bounds,window=63", "retrieval:lexical=maybe",
        "retrieval:read=never", "retrieval:pages=0",
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(spec):
    with pytest.raises(UsageError) as caught:
        parse(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["streaming:window=", "retrieval:neighbours=", "quest:budget=", "superlinear:spans="])
def test_whole_numbers_beyond_any_context_are_refused(spec):
    parse(f"{spec}{1 << 40}")
    for number in ((1 << 40) + 1, 10**20):
        with pytest.raises(UsageError, match=f"is {number}: give at most"):
            parse(f"{spec}{number}")


def test_options_of_another_type_are_refused():
    for options in ({"window": 1.5}, {"window": True}, {"window": None}, {"window": [3]}):
        with pytest.raises(UsageError, match="window"):
            make("streaming", **options)
    with pytest.raises(UsageError, match="lexical"):
        make("retrieval", lexical=1)
    assert make("superlinear", backward=2).backward == 2.0


@pytest.mark.parametrize("spec", VARIANTS)
def test_a_description_makes_the_mechanism_again(spec):
    mechanism = parse(spec)
    assert parse(mechanism.describe()) == mechanism
    assert parse(mechanism) is mechanism
    assert parse(mechanism.describe()).describe() == mechanism.describe()
    assert make(mechanism.name).describe() == mechanism.name


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 10**7),
    st.integers(0, 64),
    st.floats(0, 1e6),
    st.floats(1e-3, 1),
    st.sampled_from(["joint", "routed"]),
)
def test_any_superlinear_is_described(window, spans, backward, power, gate):
    mechanism = make("superlinear", window=window, spans=spans, backward=backward, power=power, gate=gate)
    assert parse(mechanism.describe()) == mechanism


@pytest.mark.parametrize("spec", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_costs_are_positive_and_rise_with_the_context(spec, shape):
    mechanism, before = parse(spec), None
    lengths = sorted({*range(1, 40), *(round(2 ** (i / 3)) for i in range(75)), 10_000_000})
    for n in lengths:
        cost = mechanism.cost(n, shape)
        now = (cost.decode_flops, cost.decode_bytes, cost.prefill_flops, cost.kept_bytes)
        assert all(value > 0 for value in now), f"n={n}: {cost}"
        if before is not None:
            # A decode step of the tree reads a little less whenever sixteen of its nodes become one. RocketKV keeps a
            # little less where its first stage takes over, and what it scores comes in whole chunks and channels.
            least = {"tree": (0.9, 0.9, 1, 1), "rocketkv": (0.5, 0.5, 1, 0.9)}.get(mechanism.name, (1, 1, 1, 1))
            rises = (b >= share * a for a, b, share in zip(before, now, least, strict=True))
            assert all(rises), f"falls at n={n}: {before} to {now}"
        before = now
    assert before is not None and before[2] < float("inf")


@pytest.mark.parametrize("spec", VARIANTS)
def test_no_mechanism_costs_more_than_dense_in_the_long_run(spec):
    shape, n = SHAPES[0], 1_000_000
    cost, dense = parse(spec).cost(n, shape), make("dense").cost(n, shape)
    assert cost.decode_flops <= dense.decode_flops
    # What has a context repeated reads it twice, the second time with all of it in sight, and scores that.
    times = 4 if getattr(parse(spec), "repeats", False) else 1
    assert cost.prefill_flops <= times * dense.prefill_flops * (1 + 1e-5)
    # Summaries come on top: of every block of 16 keys four vectors for Quest. SparQ keeps keys twice.
    summaries = 0.5 if parse(spec).name == "sparq" else len(parse(spec).summaries) / parse(spec).block / 2 * 16 / 15
    assert cost.kept_bytes <= dense.kept_bytes * (1 + summaries)
