import math

import diffusers
import pytest
import torch

from hf_ddpm.diffusion.schedules import BETA_SCHEDULES, beta_schedule, rescale_zero_terminal_snr


def test_linear_schedule_of_paper():
    betas = beta_schedule("linear", 1000)
    assert betas.dtype == torch.float64
    assert betas[0] == 1e-4 and betas[-1] == 0.02
    torch.testing.assert_close(betas.diff(), torch.full((999,), (0.02 - 1e-4) / 999, dtype=torch.float64))


def test_cosine_schedule_has_closed_form_of_nichol_and_dhariwal():
    # Eq. 17: alpha_bar(t) = f(t) / f(0), except that the last betas are at most 0.999.
    alphas_cumprod = torch.cumprod(1 - beta_schedule("squaredcos_cap_v2", 100), dim=0)
    f = [math.cos((t / 100 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(101)]
    expected = torch.tensor([f[t + 1] / f[0] for t in range(99)], dtype=torch.float64)
    torch.testing.assert_close(alphas_cumprod[:-1], expected, rtol=1e-9, atol=0)
    assert beta_schedule("squaredcos_cap_v2", 100)[-1] == 0.999


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
@pytest.mark.parametrize("count", [10, 1000])
def test_schedules_equal_those_of_diffusers(name, count):
    expected = diffusers.DDPMScheduler(count, beta_schedule=name).betas
    torch.testing.assert_close(beta_schedule(name, count).float(), expected, rtol=2e-4, atol=1e-9)


def test_other_schedules_of_paper_code_have_their_closed_forms():
    # quad: beta_t = (sqrt(b_0) + (sqrt(b_T) - sqrt(b_0)) t / (T - 1))^2; const: beta_t = b_T.
    quad, const = (beta_schedule(name, 11, 1e-4, 0.04) for name in ("quad", "const"))
    expected = torch.tensor([(0.01 + 0.019 * t) ** 2 for t in range(11)], dtype=torch.float64)
    torch.testing.assert_close(quad, expected, rtol=1e-12, atol=0)
    assert bool((const == 0.04).all())


def test_every_named_schedule_has_all_timesteps():
    assert all(len(beta_schedule(name, 7)) == 7 for name in BETA_SCHEDULES)


def test_zero_terminal_snr_keeps_first_beta_and_removes_last_signal():
    betas = beta_schedule("linear", 1000)
    rescaled = rescale_zero_terminal_snr(betas)
    torch.testing.assert_close(rescaled[0], betas[0])
    assert torch.cumprod(1 - rescaled, dim=0)[-1] == 0
    assert bool((rescaled > 0).all())


def test_unknown_names_and_counts_are_rejected():
    with pytest.raises(ValueError, match="beta_schedule='cosine': expected one of linear, scaled_linear"):
        beta_schedule("cosine")
    with pytest.raises(ValueError, match="num_timesteps=0"):
        beta_schedule("linear", 0)
