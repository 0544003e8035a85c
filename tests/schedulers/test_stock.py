"""Schedulers of diffusers on Gaussian data, of which the best network is known: right, or refused by name."""

import diffusers
import pytest
import torch

from hf_ddpm import DDPMScheduler
from hf_ddpm.schedulers.stock import RIGHT, check_stock
from tests.schedulers.gaussian import SAMPLERS, SPACINGS, STD, prepared, sampled_std

REFUSED = ("IPNDM", "EDMEuler", "FlowMatchEulerDiscrete")


@pytest.mark.slow
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_brightness_is_that_of_the_data_or_the_setting_is_refused(name, spacing):
    # With 20 steps the samplers are behind by some, each by its order; with 50 all are near.
    accepted = 0
    for count in (20, 50, 100, 150, 334, 501, 1000):
        try:
            scheduler = prepared(name, spacing, count)
        except ValueError as error:
            assert "scheduler" in str(error), error
            continue
        accepted += 1
        assert sampled_std(scheduler) == pytest.approx(STD, abs=0.09 if count >= 50 else 0.2), count
    assert (accepted > 0) == (name not in REFUSED)


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
        ("IPNDM", "leading", 50, "it is not made for such networks; use one of DDIMScheduler"),
        ("FlowMatchEulerDiscrete", "leading", 50, "it is not made for such networks"),
        ("DDIMInverse", "leading", 50, "it is not made for such networks"),
        ("LCM", "trailing", 50, "it is not made for such networks"),
        ("SASolver", "trailing", 10, "expected at least 20"),
    ],
)
def test_wrong_settings_are_refused_with_a_way_out(name, spacing, count, reason):
    kind = getattr(diffusers, f"{name}Scheduler")
    scheduler = kind.from_config(DDPMScheduler().config, timestep_spacing=spacing)
    scheduler.set_timesteps(count)
    with pytest.raises(ValueError, match=reason):
        check_stock(scheduler, count, from_noise=True)


@pytest.mark.parametrize("name", ["PNDM", "HeunDiscrete", "KDPM2Discrete", "EulerDiscrete", "DPMSolverMultistep"])
@pytest.mark.parametrize("count", [10, 20, 1000])
def test_ends_without_any_signal_are_refused_to_samplers_that_do_not_clip(name, count):
    # The cosine schedule: with the best network PNDM spreads brightness by 1.55 in 1000 steps, KDPM2 by 1.35 in 10.
    config = DDPMScheduler(beta_schedule="squaredcos_cap_v2").config
    scheduler = getattr(diffusers, f"{name}Scheduler").from_config(config, timestep_spacing="trailing")
    scheduler.set_timesteps(count)
    with pytest.raises(ValueError, match="multiplies the network's error by"):
        check_stock(scheduler, count, from_noise=True)


def test_larger_images_need_a_start_with_less_signal():
    # Their pixels show the brightness together: leading steps of 850 start at 849, where alpha_bar is 7e-4.
    scheduler = diffusers.EulerDiscreteScheduler.from_config(DDPMScheduler().config, timestep_spacing="leading")
    scheduler.set_timesteps(850)
    check_stock(scheduler, 850, from_noise=True, pixels=32 * 32)
    with pytest.raises(ValueError, match="starts where x_t still holds 3% of the image"):
        check_stock(scheduler, 850, from_noise=True, pixels=256 * 256)


def test_learned_log_variances_are_refused_to_diffusers():
    scheduler = diffusers.DDPMScheduler(variance_type="learned")
    with pytest.raises(ValueError, match="takes a learned log-variance for a variance"):
        check_stock(scheduler, 1000, from_noise=True)


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


@pytest.mark.parametrize("predicted", ["epsilon", "sample", "v_prediction", "mean"])
@pytest.mark.parametrize("name", sorted(set(RIGHT) - {"DPMSolverSDEScheduler"}))  # which needs torchsde
def test_predictions_that_a_scheduler_cannot_step_with_are_refused_before_the_first_step(name, predicted):
    own = DDPMScheduler(prediction_type=predicted, timestep_spacing="trailing")
    scheduler = getattr(diffusers, name).from_config(own.config)
    scheduler.set_timesteps(25)
    x_t, t = torch.zeros(1, 1, 4, 4), scheduler.timesteps[0]
    try:
        scheduler.step(x_t, t, scheduler.scale_model_input(x_t, t))
    except (ValueError, NotImplementedError):
        with pytest.raises(ValueError, match=f"scheduler {name}: it has no prediction_type='{predicted}'; use"):
            check_stock(scheduler, 25, from_noise=True)
    else:
        check_stock(scheduler, 25, from_noise=True)
