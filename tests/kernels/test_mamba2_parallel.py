"""The scan that trains: values and gradients are the reference's, whatever the length and the chunk."""

import pytest
import torch

from longspan.kernels.mamba2 import parallel, reference


def inputs(tokens, heads=4, groups=2):
    source = torch.Generator().manual_seed(tokens)

    def draw(*shape):
        return torch.randn(*shape, generator=source, dtype=torch.float64)

    made = {
        "x": draw(2, tokens, heads, 5), "dt": draw(2, tokens, heads), "A": -draw(heads).exp(),
        "B": draw(2, tokens, groups, 3), "C": draw(2, tokens, groups, 3), "D": draw(heads), "dt_bias": draw(heads),
    }  # fmt: skip
    return {name: tensor.requires_grad_() for name, tensor in made.items()}


@pytest.mark.parametrize("tokens,chunk", [(1, 16), (16, 16), (33, 16), (130, 64)])
def test_values_and_gradients_are_the_references(tokens, chunk):
    ours, theirs = inputs(tokens), inputs(tokens)
    weight = torch.randn(2, tokens, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = parallel.scan(
        *(ours[n] for n in ("x", "dt", "A", "B", "C")), D=ours["D"], dt_bias=ours["dt_bias"], chunk=chunk
    )
    wanted, _ = reference.scan(
        *(theirs[n] for n in ("x", "dt", "A", "B", "C")), D=theirs["D"], dt_bias=theirs["dt_bias"]
    )
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
    (out * weight).sum().backward()
    (wanted * weight).sum().backward()
    for name in ours:
        torch.testing.assert_close(ours[name].grad, theirs[name].grad, rtol=1e-9, atol=1e-9, msg=name)


def test_what_comes_later_changes_nothing():
    given = {name: tensor.detach() for name, tensor in inputs(70).items()}
    spoilt = {name: tensor.clone() for name, tensor in given.items()}
    spoilt["x"][:, 40:] = 1e6
    names = ("x", "dt", "A", "B", "C")
    outs = [parallel.scan(*(each[n] for n in names), chunk=32)[:, :40] for each in (given, spoilt)]
    assert torch.equal(*outs)
