"""Schedulers of diffusers on Gaussian data, of which the best network is known: right, or refused by name."""

import inspect

import diffusers
import pytest
import torch

from hf_ddpm import DDPMScheduler
from hf_ddpm.schedulers.stock import check_stock

STD, PIXELS = 0.5, 1024
COUNTS = (7, 10, 20, 50, 100, 150, 334, 501, 1000)
NAMES = [
    "DDIM", "DDPM", "PNDM", "LMSDiscrete", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete",
    "KDPM2AncestralDiscrete", "DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep",
    "SASolver", "IPNDM", "EDMEuler", "FlowMatchEulerDiscrete",
]  # fmt: skip


def brightness(scheduler, count):
    """Samples images of one brightness, N(0, 1/4): returns how far the brightness of the samples spreads."""
    log_bars = torch.log(torch.cumprod(1 - scheduler.betas.double(), 0))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, PIXELS, generator=generator) * scheduler.init_noise_sigma
    options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in scheduler.timesteps:
        x_t = scheduler.scale_model_input(x, t)
        low, part = int(t), float(t) - int(t)
        ab = torch.lerp(log_bars[low], log_bars[min(low + 1, 999)], part).exp().item()
        mean = x_t.double().mean(dim=1, keepdim=True)
        v = ab**0.5 * STD**2 / (ab * STD**2 + (1 - ab) / PIXELS) * mean
        x = scheduler.step(((x_t - ab**0.5 * v) / (1 - ab) ** 0.5).float(), t, x, **options).prev_sample
    return x.double().mean(dim=1).std().item()


@pytest.mark.slow
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", NAMES)
def test_brightness_is_that_of_the_data_or_the_setting_is_refused(name, spacing):
    # 50 steps are enough for every sampler; with fewer, all of them are behind by some, but none is far off.
    config = DDPMScheduler(clip_sample=False).config
    accepted = 0
    for count in COUNTS:
        scheduler = getattr(diffusers, f"{name}Scheduler").from_config(config, timestep_spacing=spacing)
        try:
            scheduler.set_timesteps(count)
            check_stock(scheduler, count, from_noise=True)
        except ValueError as error:
            assert "scheduler" in str(error), error
            continue
        accepted += 1
        assert brightness(scheduler, count) == pytest.approx(STD, abs=0.08 if count >= 50 else 0.21), count
    assert (accepted > 0) == (name not in ("IPNDM", "EDMEuler", "FlowMatchEulerDiscrete"))


@pytest.mark.parametrize(
    ("name", "spacing", "count", "reason"),
    [
        ("DDIM", "trailing", 334, "each step leads to t - 2, which is not the next timestep; use hf_ddpm.DDIM"),
        ("DDIM", "linspace", 50, "each step leads to t - 20"),
        ("DDIM", "leading", 501, "starts where x_t still holds 28% of the image; use DDIMScheduler.from_config"),
        ("PNDM", "trailing", 150, "each step leads to t - 6"),
        ("DPMSolverMultistep", "linspace", 1000, "taken twice"),
        ("DPMSolverMultistep", "leading", 2, "starts where x_t"),
        ("EulerDiscrete", "leading", 600, "starts where x_t"),
        ("IPNDM", "leading", 50, "a noise schedule of its own"),
        ("FlowMatchEulerDiscrete", "leading", 50, "a noise schedule of its own"),
    ],
)
def test_wrong_settings_are_refused_with_a_way_out(name, spacing, count, reason):
    kind = getattr(diffusers, f"{name}Scheduler")
    scheduler = kind.from_config(DDPMScheduler().config, timestep_spacing=spacing)
    scheduler.set_timesteps(count)
    with pytest.raises(ValueError, match=reason):
        check_stock(scheduler, count, from_noise=True)


def test_latents_may_start_anywhere():
    scheduler = diffusers.DDIMScheduler.from_config(DDPMScheduler().config)
    scheduler.set_timesteps(501)
    check_stock(scheduler, 501, from_noise=False)


def test_noise_of_the_last_step_is_refused():
    scheduler = diffusers.DDPMScheduler(variance_type="fixed_large", timestep_spacing="trailing")
    scheduler.set_timesteps(50)
    with pytest.raises(ValueError, match="noise of the last step stays in the images"):
        check_stock(scheduler, 50, from_noise=True)
    scheduler.set_timesteps(1000)
    check_stock(scheduler, 1000, from_noise=True)
