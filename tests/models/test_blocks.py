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
def test_sinusoids_are_those_of_diffusers(dim, flip, shift):
    t = torch.tensor([0, 1, 999])
    expected = get_timestep_embedding(t, dim, flip_sin_to_cos=flip, downscale_freq_shift=shift)
    torch.testing.assert_close(sinusoidal(t, dim, flip_sin_to_cos=flip, freq_shift=shift), expected)


def test_frequencies_run_from_1_to_1e_minus_4_in_the_paper():
    embedding = sinusoidal(torch.tensor([2]), 6, flip_sin_to_cos=False, freq_shift=1)[0].tolist()
    angles = [2 * f for f in (1, 1e-2, 1e-4)]
    assert embedding == pytest.approx([math.sin(a) for a in angles] + [math.cos(a) for a in angles], rel=1e-5)


class Norms(TorchFunctionMode):
    """Notes what group normalizations get, and whether autocast, which on CUDA makes all float32, is on then."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.group_norm:
            dtypes = {value.dtype for value in args if isinstance(value, torch.Tensor)}
            self.seen.append((dtypes, torch.is_autocast_enabled("cpu")))
        return func(*args, **(kwargs or {}))


def test_normalizations_work_in_half_precision_under_autocast(monkeypatch):
    monkeypatch.setattr(blocks, "MIXED_NORMS", ())  # as on a GPU
    network = UNet2DModel(**TINY_UNET)
    with torch.autocast("cpu", torch.bfloat16), Norms() as norms:
        network(torch.randn(2, 1, 8, 8), 3).sample.sum().backward()
    count = sum(isinstance(module, GroupNorm) for module in network.modules())
    assert norms.seen == [({torch.bfloat16}, False)] * count and count > 10
    assert all(parameter.grad.dtype == torch.float32 for parameter in network.parameters())


@pytest.mark.parametrize("mixed", [(), ("cpu",)])
def test_statistics_in_half_precision_are_those_of_float32(monkeypatch, mixed):
    monkeypatch.setattr(blocks, "MIXED_NORMS", mixed)
    norm, x = GroupNorm(4, 16), torch.randn(2, 16, 32, 32) + 100
    expected = torch.nn.functional.group_norm(x.bfloat16().double(), 4)
    # A bfloat16 has 8 bits of mantissa: the outputs, of variance 1, are rounded by 2^-9 of up to 4.
    assert (norm(x.bfloat16()) - expected).abs().max() < 4 * 2**-8
