"""The product with one token: the same numbers as PyTorch's linear, and only where it serves."""

import pytest
import torch
from torch import nn

from longspan.hf.loading import load
from longspan.hf.one_token import OneTokenLinear, use_one_token_linear

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 96), (1, 96), (96,), (1, 3, 96), (0, 96)])
def test_it_is_linear(dtype, bias, shape):
    generator = torch.Generator().manual_seed(0)
    plain = nn.Linear(96, 50, bias=bias)
    plain = plain.to(dtype)
    model = nn.Sequential(plain)
    x = torch.randn(*shape, generator=generator).to(dtype)
    exact = x.double() @ plain.weight.double().T + (plain.bias.double() if bias else 0)
    use_one_token_linear(model)
    assert type(model[0]) is OneTokenLinear
    with torch.inference_mode():
        out = model(x)
    assert out.shape == (*shape[:-1], 50) and out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, atol=4 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps)


def test_float32_and_subclasses_stay_as_they_are():
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Own(4, 4).bfloat16(), nn.Linear(4, 4).bfloat16())
    use_one_token_linear(model)
    assert [type(each) for each in model] == [nn.Linear, Own, OneTokenLinear]


def test_gradients_take_the_usual_way():
    model = nn.Sequential(nn.Linear(8, 8).bfloat16())
    use_one_token_linear(model)
    x = torch.randn(1, 8, dtype=torch.bfloat16, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None and model[0].weight.grad is not None


def test_a_loaded_model_has_it_in_half_types_alone(folder):
    for dtype, expected in ((torch.bfloat16, True), (torch.float32, False)):
        model = load(str(folder), device="cpu", dtype=dtype).model
        found = [type(module) is OneTokenLinear for module in model.modules() if isinstance(module, nn.Linear)]
        assert found and all(each == expected for each in found)
