import math

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding

from hf_ddpm.models.blocks import sinusoidal


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
