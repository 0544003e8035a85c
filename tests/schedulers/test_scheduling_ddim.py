"""DDIM compared with its recursion in float64."""

import numpy as np
import pytest
import torch

from hf_ddpm import DDIMScheduler, DDPMScheduler

T = 1000
ALPHA_BARS = np.cumprod(1 - np.linspace(1e-4, 0.02, T))


def walk(scheduler, x, network, **options):
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, **options).prev_sample
    return x


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("count", [7, 10, 20, 150, 334, 501, 600, T])
def test_steps_lead_from_each_timestep_to_next(spacing, count):
    # Song et al. 2021, Eq. 12, at the timesteps of the network; data N(0, 1/4) and the optimal network for them.
    scheduler = DDIMScheduler(timestep_spacing=spacing, clip_sample=False)
    scheduler.set_timesteps(count)
    steps = scheduler.timesteps.tolist()

    def gain(t):  # predicted noise / x_t
        return (1 - ALPHA_BARS[t]) ** 0.5 / (ALPHA_BARS[t] / 4 + 1 - ALPHA_BARS[t])

    expected = 1.0
    for t, after in zip(steps, [*steps[1:], -1], strict=True):
        a, b = ALPHA_BARS[t], ALPHA_BARS[after] if after >= 0 else 1.0
        eps = gain(t) * expected
        expected = b**0.5 * (expected - (1 - a) ** 0.5 * eps) / a**0.5 + (1 - b) ** 0.5 * eps
    x_0 = walk(scheduler, torch.ones(1, 1, 1, 1, dtype=torch.float64), lambda x, t: gain(int(t)) * x)
    assert x_0.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("count", [7, 50, 334, T])
@pytest.mark.parametrize("clip_sample", [True, False])
@pytest.mark.parametrize("kind", ["epsilon", "mean"])
def test_eta_1_is_ddpm(count, clip_sample, kind):
    options = {"timestep_spacing": "trailing", "clip_sample": clip_sample, "prediction_type": kind}
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    samples = []
    for scheduler, eta in [(DDPMScheduler(**options), {}), (DDIMScheduler(**options), {"eta": 1.0})]:
        scheduler.set_timesteps(count)
        generator = torch.Generator().manual_seed(1)
        samples.append(walk(scheduler, x, lambda x, t: torch.tanh(x) * 1.1, generator=generator, **eta))
    torch.testing.assert_close(*samples, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_marginals_are_those_of_process_for_every_eta(eta):
    # A step with the true noise must lead from x_t to x_after of the same image (Song et al. 2021, Lemma 1).
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(20)
    steps = scheduler.timesteps.tolist()
    generator = torch.Generator().manual_seed(0)
    x_start = torch.full((1, 1, 400, 400), 0.5, dtype=torch.float64)
    for t, after in zip(steps[:-1], steps[1:], strict=True):
        noise = torch.randn(x_start.shape, generator=generator, dtype=torch.float64)
        a, b = ALPHA_BARS[t], ALPHA_BARS[after]
        x_t = a**0.5 * x_start + (1 - a) ** 0.5 * noise
        x_after = scheduler.step(noise, t, x_t, eta=eta, generator=generator).prev_sample
        assert x_after.mean().item() == pytest.approx(b**0.5 * 0.5, abs=0.015)
        assert x_after.std().item() == pytest.approx((1 - b) ** 0.5, rel=0.01)


def test_noise_is_computed_from_clipped_image():
    # The network predicts zero noise for an x_t out of the range of images. The next sample must combine the clipped
    # image and the noise that leads from it to x_t; diffusers would use the predicted noise, zero.
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    t, after = scheduler.timesteps[:2].tolist()
    x_t = torch.full((1, 1, 2, 2), 1.5, dtype=torch.float64)
    noise = (1.5 - ALPHA_BARS[t] ** 0.5) / (1 - ALPHA_BARS[t]) ** 0.5
    expected = ALPHA_BARS[after] ** 0.5 + (1 - ALPHA_BARS[after]) ** 0.5 * noise
    output = scheduler.step(torch.zeros_like(x_t), t, x_t)
    torch.testing.assert_close(output.prev_sample, torch.full_like(x_t, expected))
    assert bool((output.pred_original_sample == 1).all())


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_eta_out_of_range_is_rejected(eta):
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="eta="):
        DDIMScheduler().step(x, 500, x, eta=eta)
