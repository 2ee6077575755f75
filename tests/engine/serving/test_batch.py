"""A batched step: every context reads on as it would alone, whoever reads beside it, comes, goes or fails."""

import pytest
import torch

from longspan.attention import parse
from longspan.engine.kv_context import KVContext
from longspan.engine.serving import batch as batches
from longspan.engine.serving.batch import Batch
from longspan.errors import PoolExhaustedError
from longspan.hf.model import CausalModel
from longspan.kv.budget import Budget

SPECS = (
    ("dense", None),
    ("dense", "int8"),
    ("streaming:window=100,sinks=4", None),
    ("superlinear:window=80,spans=2", None),
    ("quest:budget=128,window=64", None),
    ("tree:leaves=4,window=64", None),
    ("snapkv:budget=150", None),
)
LENGTHS = (300, 70, 1, 255, 130, 64, 200)


@pytest.fixture
def numbers():
    return torch.randint(320, (400,), generator=torch.Generator().manual_seed(1)).tolist()


def contexts_of(model, numbers, specs=SPECS, lengths=LENGTHS):
    made = []
    for (spec, kv_format), length in zip(specs, lengths, strict=True):
        context = KVContext(model, parse(spec), kv_format=kv_format)
        context.extend(numbers[: length // 2])
        context.step(numbers[length // 2 : length])
        made.append(context)
    return made


def together(model, contexts, tokens, count, steps=None):
    """Greedy tokens of each context; `steps` says after how many a context leaves."""
    batch, said = Batch(model), [[token] for token in tokens]
    for step in range(count):
        going = [i for i in range(len(contexts)) if steps is None or step < steps[i]]
        logits, failed = batch.step([contexts[i] for i in going], [said[i][-1] for i in going])
        assert not failed
        for i, token in zip(going, logits.argmax(-1).tolist(), strict=True):
            said[i].append(token)
            if steps is not None and step + 1 == steps[i]:
                batch.leave(contexts[i])
    for context in contexts:
        batch.leave(context)
    return said


def alone(context, token, count):
    said = [token]
    for _ in range(count):
        said.append(int(context.step(said[-1:]).argmax()))
    return said


def test_all_mechanisms_in_one_batch_say_what_they_say_alone(tiny, numbers):
    tokens = numbers[-len(SPECS) :]
    ours, theirs = (contexts_of(tiny, numbers) for _ in range(2))
    said = together(tiny, ours, tokens, 40)
    for i, context in enumerate(theirs):
        assert said[i] == alone(context, tokens[i], 40), SPECS[i]
        assert ours[i].tokens == context.tokens


def test_a_window_that_holds_all_lies_in_a_stack_until_it_does_not(tiny, numbers):
    kinds = ("streaming:window=100,sinks=4", "superlinear:window=80,spans=2", "dense", "sparse:window=96",
             "superlinear:window=80,spans=2,gate=routed")  # fmt: skip
    specs = tuple((kind, None) for kind in kinds)
    lengths = (80, 60, 60, 70, 300)
    ours, theirs = (contexts_of(tiny, numbers, specs, lengths) for _ in range(2))
    batch, said = Batch(tiny), [[token] for token in numbers[:5]]
    stacked = []
    for _ in range(50):
        logits, failed = batch.step(ours, [each[-1] for each in said])
        assert not failed
        stacked.append([id(context) in batch._where for context in ours])
        for each, token in zip(said, logits.argmax(-1).tolist(), strict=True):
            each.append(token)
    for context in ours:
        batch.leave(context)
    assert stacked[0] == [True, True, True, True, False] and stacked[-1] == [False, False, True, False, False]
    for i, context in enumerate(theirs):
        assert said[i] == alone(context, numbers[i], 50), specs[i]
        assert ours[i].tokens == context.tokens


def test_contexts_come_and_go_between_steps(tiny, numbers):
    specs, lengths = (("dense", None),) * 6, (250, 3, 100, 255, 64, 17)
    ours, theirs = (contexts_of(tiny, numbers, specs, lengths) for _ in range(2))
    steps = [5, 80, 1, 64, 33, 80]
    said = together(tiny, ours, numbers[:6], 80, steps)
    for i, context in enumerate(theirs):
        assert said[i] == alone(context, numbers[i], steps[i])
        assert ours[i].tokens == context.tokens and ours[i].length == lengths[i] + steps[i]
        following = [context.step([7]) for context in (ours[i], context)]
        torch.testing.assert_close(*following, atol=1e-4, rtol=1e-4)  # pages hold what was read in the batch
    assert {kv.length for context in ours for kv in context.layers} == {
        length + n + 1 for length, n in zip(lengths, steps, strict=True)
    }


@pytest.mark.parametrize("family", ["nemotron_h", "qwen3_next", "lfm2", "falcon_h1"])
def test_hybrid_models_carry_a_state_for_each(models, numbers, family):
    model = models(family)[0]
    specs, lengths = (("dense", None), ("streaming:window=70", None), ("dense", None)), (130, 90, 2)
    numbers = [number % model.config.vocab_size for number in numbers]
    ours, theirs = (contexts_of(model, numbers, specs, lengths) for _ in range(2))
    said = together(model, ours, numbers[:3], 12)
    assert said == [alone(context, numbers[i], 12) for i, context in enumerate(theirs)]


@pytest.mark.parametrize("family", ["nemotron_h", "llama"])
def test_native_forwards_step_a_batch(models, tiny, numbers, family):
    modules = tiny if family == "llama" else models(family)[0]
    native = CausalModel(family, modules.model, modules.tokenizer, native=True)
    specs, lengths = (("dense", None), ("superlinear:window=80,spans=2", None)), (130, 90)
    numbers = [number % native.config.vocab_size for number in numbers]
    ours, theirs = (contexts_of(native, numbers, specs, lengths) for _ in range(2))
    said = together(native, ours, numbers[:2], 12)
    assert said == [alone(context, numbers[i], 12) for i, context in enumerate(theirs)]


def test_one_that_has_no_room_leaves_the_others_as_they_are(tiny, numbers):
    page = KVContext(tiny, parse("dense")).layers[0].pool.least_bytes
    for spec in ("streaming:window=100,sinks=4", "dense"):
        tight = KVContext(tiny, parse(spec), budget=Budget(3 * page))
        other, beside = (KVContext(tiny, parse(spec)) for _ in range(2))
        for context in (tight, other, beside):
            context.step(numbers[:60])
        batch, said, failed = Batch(tiny), [[5], [5]], {}
        for _ in range(70):
            logits, failed = batch.step([tight, other], [each[-1] for each in said])
            if failed:
                break
            for each, token in zip(said, logits.argmax(-1).tolist(), strict=True):
                each.append(token)
        assert list(failed) == [0] and isinstance(failed[0], PoolExhaustedError), spec
        said[1].append(int(logits[1].argmax()))
        assert said[1] == alone(beside, 5, len(said[1]) - 1)
        batch.leave(other)
        assert {kv.length for kv in tight.layers} == {tight.length} and other.tokens == beside.tokens


def test_a_long_context_leaves_its_stack(tiny, numbers, monkeypatch):
    monkeypatch.setattr(batches, "STACKED", 300)
    ours, theirs = (contexts_of(tiny, numbers, (("dense", None),) * 2, (290, 250)) for _ in range(2))
    said = together(tiny, ours, numbers[:2], 30)
    assert said == [alone(context, numbers[i], 30) for i, context in enumerate(theirs)]
