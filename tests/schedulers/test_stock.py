"""diffusers schedulers on Gaussian data with a known optimal network: correct, or rejected."""

import diffusers
import pytest
import torch

from hf_ddpm import DDPMScheduler
from hf_ddpm.schedulers.stock import SUPPORTED_SCHEDULERS, check_stock
from tests.schedulers.gaussian import SAMPLERS, SPACINGS, STD, prepared, sampled_std

REJECTED = ("IPNDM", "EDMEuler", "FlowMatchEulerDiscrete")


@pytest.mark.slow
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_brightness_is_that_of_data_or_setting_is_rejected(name, spacing):
    # With 20 steps the error depends on the order of the sampler; with 50 steps all errors are small.
    accepted = 0
    for count in (20, 50, 100, 150, 334, 501, 1000):
        try:
            scheduler = prepared(name, spacing, count)
        except ValueError as error:
            assert "scheduler" in str(error), error
            continue
        accepted += 1
        assert sampled_std(scheduler) == pytest.approx(STD, abs=0.09 if count >= 50 else 0.2), count
    assert (accepted > 0) == (name not in REJECTED)


@pytest.mark.parametrize(
    ("name", "spacing", "count", "reason"),
    [
        ("DDIM", "trailing", 334, "each step leads to t - 2, which is not the next timestep; use hf_ddpm.DDIM"),
        ("DDIM", "linspace", 50, "each step leads to t - 20"),
        ("DDIM", "leading", 501, "not noise but contains 28% of the image; use DDIMScheduler.from_config"),
        ("PNDM", "trailing", 150, "each step leads to t - 6"),
        ("DPMSolverMultistep", "linspace", 1000, "a timestep is repeated; use"),
        ("DPMSolverMultistep", "leading", 2, "the first x_t is not noise"),
        ("EulerDiscrete", "leading", 600, "the first x_t is not noise"),
        ("IPNDM", "leading", 50, "not made for DDPM networks; expected one of DDIMScheduler"),
        ("FlowMatchEulerDiscrete", "leading", 50, "not made for DDPM networks"),
        ("DDIMInverse", "leading", 50, "not made for DDPM networks"),
        ("LCM", "trailing", 50, "not made for DDPM networks"),
        ("SASolver", "trailing", 10, "expected at least 20"),
    ],
)
def test_wrong_settings_are_rejected_with_remedy(name, spacing, count, reason):
    kind = getattr(diffusers, f"{name}Scheduler")
    scheduler = kind.from_config(DDPMScheduler().config, timestep_spacing=spacing)
    scheduler.set_timesteps(count)
    with pytest.raises(ValueError, match=reason):
        check_stock(scheduler, count, from_noise=True)


@pytest.mark.parametrize("name", ["PNDM", "HeunDiscrete", "KDPM2Discrete", "EulerDiscrete", "DPMSolverMultistep"])
@pytest.mark.parametrize("count", [10, 20, 1000])
def test_samplers_without_clipping_are_rejected_if_x_t_has_no_signal(name, count):
    # With the cosine schedule and the optimal network, the standard deviation of the brightness would be 1.55 for PNDM
    # with 1000 steps and 1.35 for KDPM2 with 10 steps.
    config = DDPMScheduler(beta_schedule="squaredcos_cap_v2").config
    scheduler = getattr(diffusers, f"{name}Scheduler").from_config(config, timestep_spacing="trailing")
    scheduler.set_timesteps(count)
    with pytest.raises(ValueError, match="multiplies the network's error by"):
        check_stock(scheduler, count, from_noise=True)


def test_larger_images_must_start_with_less_signal():
    # More pixels show the brightness of an image. 850 leading steps start at t = 849, where alpha_bar is 7e-4.
    scheduler = diffusers.EulerDiscreteScheduler.from_config(DDPMScheduler().config, timestep_spacing="leading")
    scheduler.set_timesteps(850)
    check_stock(scheduler, 850, from_noise=True, pixels=32 * 32)
    with pytest.raises(ValueError, match="the first x_t is not noise but contains 3% of the image"):
        check_stock(scheduler, 850, from_noise=True, pixels=256 * 256)


def test_learned_log_variances_are_rejected_with_diffusers():
    scheduler = diffusers.DDPMScheduler(variance_type="learned")
    with pytest.raises(ValueError, match="treats the learned log-variance as a variance; use hf_ddpm.DDPMScheduler"):
        check_stock(scheduler, 1000, from_noise=True)


def test_latents_may_start_anywhere():
    scheduler = diffusers.DDIMScheduler.from_config(DDPMScheduler().config)
    scheduler.set_timesteps(501)
    check_stock(scheduler, 501, from_noise=False)


def test_noise_of_last_step_is_rejected():
    scheduler = diffusers.DDPMScheduler(variance_type="fixed_large", timestep_spacing="trailing")
    scheduler.set_timesteps(50)
    with pytest.raises(ValueError, match="noise of the last step stays in the images"):
        check_stock(scheduler, 50, from_noise=True)
    scheduler.set_timesteps(1000)
    check_stock(scheduler, 1000, from_noise=True)


@pytest.mark.parametrize("predicted", ["epsilon", "sample", "v_prediction", "mean"])
@pytest.mark.parametrize("name", sorted(set(SUPPORTED_SCHEDULERS) - {"DPMSolverSDEScheduler"}))  # which needs torchsde
def test_unsupported_predictions_are_rejected_before_first_step(name, predicted):
    own = DDPMScheduler(prediction_type=predicted, timestep_spacing="trailing")
    scheduler = getattr(diffusers, name).from_config(own.config)
    scheduler.set_timesteps(25)
    x_t, t = torch.zeros(1, 1, 4, 4), scheduler.timesteps[0]
    try:
        scheduler.step(x_t, t, scheduler.scale_model_input(x_t, t))
    except (ValueError, NotImplementedError):
        with pytest.raises(ValueError, match=f"scheduler {name}: does not support prediction_type='{predicted}'; use"):
            check_stock(scheduler, 25, from_noise=True)
    else:
        check_stock(scheduler, 25, from_noise=True)
