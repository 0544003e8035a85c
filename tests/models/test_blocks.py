import math

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch.overrides import TorchFunctionMode

from hf_ddpm import UNet2DModel
from hf_ddpm.models import blocks
from hf_ddpm.models.blocks import GroupNorm, sinusoidal
from tests.conftest import TINY_UNET


@pytest.mark.parametrize("dim", [8, 9])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [0, 1])
def test_sinusoids_equal_those_of_diffusers(dim, flip, shift):
    t = torch.tensor([0, 1, 999])
    expected = get_timestep_embedding(t, dim, flip_sin_to_cos=flip, downscale_freq_shift=shift)
    torch.testing.assert_close(sinusoidal(t, dim, flip_sin_to_cos=flip, freq_shift=shift), expected)


def test_frequencies_of_paper_are_1_to_1e_minus_4():
    embedding = sinusoidal(torch.tensor([2]), 6, flip_sin_to_cos=False, freq_shift=1)[0].tolist()
    angles = [2 * f for f in (1, 1e-2, 1e-4)]
    assert embedding == pytest.approx([math.sin(a) for a in angles] + [math.cos(a) for a in angles], rel=1e-5)


class Norms(TorchFunctionMode):
    """Records the dtypes of group normalizations, and whether autocast (float32 on CUDA) is enabled in them."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.group_norm:
            dtypes = {value.dtype for value in args if isinstance(value, torch.Tensor)}
            self.calls.append((dtypes, torch.is_autocast_enabled("cpu")))
        return func(*args, **(kwargs or {}))


def test_normalizations_run_in_half_precision_under_autocast(monkeypatch):
    monkeypatch.setattr(blocks, "MIXED_NORMS", ())  # as on a GPU
    network = UNet2DModel(**TINY_UNET)
    with torch.autocast("cpu", torch.bfloat16), Norms() as norms:
        network(torch.randn(2, 1, 8, 8), 3).sample.sum().backward()
    count = sum(isinstance(module, GroupNorm) for module in network.modules())
    assert norms.calls == [({torch.bfloat16}, False)] * count and count > 10
    assert all(parameter.grad.dtype == torch.float32 for parameter in network.parameters())


@pytest.mark.parametrize("mixed", [(), ("cpu",)])
def test_normalization_statistics_have_float32_precision(monkeypatch, mixed):
    monkeypatch.setattr(blocks, "MIXED_NORMS", mixed)
    norm, x = GroupNorm(4, 16), torch.randn(2, 16, 32, 32) + 100
    expected = torch.nn.functional.group_norm(x.bfloat16().double(), 4)
    # bfloat16 has 8 bits of mantissa: rounding changes outputs of up to 4 (their variance is 1) by up to 2^-9 of them.
    assert (norm(x.bfloat16()) - expected).abs().max() < 4 * 2**-8


# Batch, heads, positions and channels per head: too few entries or too many positions for plain products, and others.
@pytest.mark.parametrize("shape", [(1, 1, 16, 64), (4, 1, 2048, 8), (16, 1, 16, 64), (8, 4, 64, 16), (3, 2, 1024, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("half", [False, True])
def test_attention_equals_its_formula(shape, dtype, half):
    torch.manual_seed(0)
    inputs = [torch.randn(shape).to(dtype).requires_grad_() for _ in range(3)]
    gradient = torch.randn(shape).to(dtype)
    q, k, v = (value.detach().double().requires_grad_() for value in inputs)
    expected = ((q @ k.mT) / math.sqrt(shape[-1])).softmax(dim=-1) @ v
    exact = [expected, *torch.autograd.grad(expected, (q, k, v), gradient.double())]

    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        output = blocks.attend(*inputs)
    computed = [output, *torch.autograd.grad(output, inputs, gradient.to(output.dtype))]
    limit = 1e-5 if dtype == torch.float32 and not half else 0.01
    for actual, expected in zip(computed, exact, strict=True):
        assert (actual - expected).norm() < limit * expected.norm()


def test_attention_in_bf16_on_cpu_uses_plain_products(monkeypatch):
    fused = []
    monkeypatch.setattr(
        "torch.nn.functional.scaled_dot_product_attention", lambda q, k, v: (fused.append(q.dtype), q)[1]
    )
    for dtype, shape in (
        (torch.float32, (16, 1, 64, 64)),
        (torch.bfloat16, (16, 1, 64, 64)),
        (torch.bfloat16, (1, 1, 64, 64)),
    ):
        q = torch.zeros(shape, dtype=dtype)
        blocks.attend(q, q, q)
    assert fused == [torch.float32, torch.bfloat16]
