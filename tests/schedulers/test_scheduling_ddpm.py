import diffusers
import numpy as np
import pytest
import torch

from hf_ddpm import DDPMScheduler

T = 1000


def both(**config):
    return DDPMScheduler(**config), diffusers.DDPMScheduler(**config)


def inputs(*, dtype=torch.float32):
    x_start, noise = torch.randn(2, 2, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x_start.clamp(-1, 1).to(dtype), noise.to(dtype)


def step(scheduler, t, x_t, prediction):
    return scheduler.step(prediction, t, x_t, generator=torch.Generator().manual_seed(1)).prev_sample


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("count", [T, 50, 16, 7])  # 1000 / 16 ends in .5 and is rounded
def test_steps_equal_those_of_diffusers(variance_type, spacing, count):
    # The tolerances are the errors of diffusers, which computes coefficients in float32: up to 1.3e-4 at t = 2 and
    # 3.2e-6 from t = 50 on, for |x| up to 3. Errors here are at most 3.8e-7: test_steps_equal_theory.
    ours, theirs = both(variance_type=variance_type, timestep_spacing=spacing)
    ours.set_timesteps(count)
    theirs.set_timesteps(count)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    x_start, noise = inputs()
    for t in ours.timesteps:
        x_t = ours.add_noise(x_start, noise, t.view(1))
        if t == ours.timesteps[-1] and t > 0 and variance_type == "fixed_large":
            continue  # here diffusers leaves noise in the image: test_last_step_adds_no_noise
        actual, expected = step(ours, t, x_t, noise), step(theirs, t, x_t, noise)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1.3e-4 if t < 50 else 4e-6)
        assert ours.previous_timestep(t) == theirs.previous_timestep(t)


@pytest.mark.parametrize("count", [T, 50])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "mean", "v_prediction"])
def test_steps_equal_theory(prediction_type, count):
    # Algorithm 2 with beta' = 1 - alpha_bar / alpha_bar', in float64 and with noise.
    scheduler = DDPMScheduler(variance_type="fixed_large", prediction_type=prediction_type, clip_sample=False)
    scheduler.set_timesteps(count)
    alpha_bars = torch.cumprod(1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64), 0).tolist()
    x_start, eps = inputs(dtype=torch.float64)
    steps = [*scheduler.timesteps.tolist(), -1]
    for t, before in zip(steps[:-1], steps[1:], strict=True):
        a, a_before = alpha_bars[t], alpha_bars[before] if before >= 0 else 1.0
        beta = 1 - a / a_before
        x_t = a**0.5 * x_start + (1 - a) ** 0.5 * eps
        expected = (x_t - beta / (1 - a) ** 0.5 * eps) / (1 - beta) ** 0.5
        if before >= 0:
            z = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            expected = expected + beta**0.5 * z
        v = a**0.5 * eps - (1 - a) ** 0.5 * x_start
        # Networks that predict means are trained for single steps, also if sampling takes longer steps.
        a_next = alpha_bars[t - 1] if t > 0 else 1.0
        beta_t = 1 - a / a_next
        mean = a_next**0.5 * beta_t / (1 - a) * x_start + (1 - beta_t) ** 0.5 * (1 - a_next) / (1 - a) * x_t
        predictions = {"epsilon": eps, "sample": x_start, "mean": mean, "v_prediction": v}
        prediction = predictions[prediction_type]
        torch.testing.assert_close(step(scheduler, t, x_t, prediction), expected, rtol=0, atol=1e-11)


def test_float32_steps_equal_float64_steps_up_to_rounding():
    # As the only step it adds no noise, so the result is x_0-hat in both precisions.
    scheduler = DDPMScheduler(clip_sample=False)
    signal = scheduler.alphas_cumprod.sqrt().tolist()
    x_start, eps = inputs()
    for t in range(1, T):
        x_t = scheduler.add_noise(x_start, eps, torch.tensor([t]))
        scheduler.set_timesteps(timesteps=[t])
        single = step(scheduler, t, x_t, eps)
        double = step(scheduler, t, x_t.double(), eps.double())
        torch.testing.assert_close(single.double(), double, rtol=3e-7, atol=5e-7 / signal[t])


def test_last_step_adds_no_noise():
    # Trailing steps end at t = 19. diffusers adds noise at every t > 0, so its images have noise with deviation 0.06.
    ours, theirs = both(variance_type="fixed_large", timestep_spacing="trailing", clip_sample=False)
    ours.set_timesteps(50)
    theirs.set_timesteps(50)
    last = ours.timesteps[-1]
    x_start, noise = inputs()
    x_t = ours.add_noise(x_start, noise, last.view(1))
    torch.testing.assert_close(step(ours, last, x_t, noise), x_start, rtol=0, atol=1e-5)
    assert (step(theirs, last, x_t, noise) - x_start).std() > 0.05


@pytest.mark.parametrize(
    "config",
    [
        {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9},
        {"clip_sample_range": 0.5},
        {"clip_sample": False},
        {"variance_type": "fixed_small_log"},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        {"prediction_type": "sample", "beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [1e-3 * (1 + i / 1000) for i in range(T)]},
        {"steps_offset": 1},
    ],
    ids=lambda config: "-".join(config),
)
def test_options_have_same_meaning_as_in_diffusers(config):
    ours, theirs = both(**config)
    ours.set_timesteps(50)
    theirs.set_timesteps(50)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    x_start, noise = inputs()
    for t in ours.timesteps:
        x_t = ours.add_noise(2 * x_start, noise, t.view(1))
        # A cosine schedule divides by 1 - alpha_bar of 4e-5 in float32.
        torch.testing.assert_close(step(ours, t, x_t, noise), step(theirs, t, x_t, noise), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_every_number_of_steps_is_supported(spacing):
    # diffusers returns 62 timesteps for 61 steps with trailing spacing, the last one -1.
    scheduler = DDPMScheduler(timestep_spacing=spacing)
    for count in range(1, T + 1):
        scheduler.set_timesteps(count)
        steps = scheduler.timesteps
        assert len(steps) == count and 0 <= steps[-1] and steps[0] < T and (steps.diff() < 0).all()


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_timesteps_start_from_noise_and_equal_those_of_diffusers_if_possible(spacing, schedule):
    # Sampling starts from pure noise, but 501 leading timesteps of diffusers start at t = 500.
    ours, theirs = both(timestep_spacing=spacing, beta_schedule=schedule)
    signal = theirs.alphas_cumprod.double()
    equal = 0
    for count in range(1, T + 1):
        ours.set_timesteps(count)
        assert signal[ours.timesteps[0]] <= 1.0001e-3
        theirs.set_timesteps(count)
        if theirs.timesteps[0] < T and signal[theirs.timesteps[0]] <= 0.9999e-3 and len(theirs.timesteps) == count:
            assert ours.timesteps.tolist() == theirs.timesteps.tolist()
            equal += 1
    assert equal > (50 if spacing == "leading" else 800)


def test_offset_beyond_last_timestep_is_ignored():
    scheduler = DDPMScheduler(steps_offset=1)
    scheduler.set_timesteps(T)
    assert scheduler.timesteps.tolist() == list(range(T - 1, -1, -1))


@pytest.mark.parametrize("name", ["Heun", "KDPM2", "LMS", "Euler"])
def test_from_config_of_other_schedulers_keeps_betas(name):
    # from_config drops values recorded as defaults: Heun's own default betas, 0.00085 to 0.012, would replace them.
    kind = getattr(diffusers, f"{name}DiscreteScheduler")
    ours = DDPMScheduler()
    torch.testing.assert_close(kind.from_config(ours.config).alphas_cumprod, ours.alphas_cumprod)
    assert DDPMScheduler.from_config(kind.from_config(ours.config).config).config.beta_end == 0.02


@pytest.mark.parametrize("clip_sample", [True, False])
def test_predicted_mean_is_mean(clip_sample):
    # As in the paper's code, clipping changes only the returned estimate of the image, here with values up to 30.
    scheduler = DDPMScheduler(prediction_type="mean", clip_sample=clip_sample)
    x_t, mean = inputs()
    for t in (999, 500, 3, 0):
        z = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(1))
        before = scheduler.alphas_cumprod[t - 1].double() if t else 1.0
        variance = scheduler.betas[t].double() * (1 - before) / (1 - scheduler.alphas_cumprod[t].double())
        expected = mean + variance**0.5 * z
        torch.testing.assert_close(step(scheduler, t, x_t, mean), expected.float(), rtol=1e-3, atol=1e-4)
        estimate = scheduler.step(mean, t, x_t, generator=torch.Generator()).pred_original_sample
        assert bool(estimate.abs().max() <= 1) == clip_sample


def exact_log_var(ab, before, variance):
    """Return the log-variance of the optimal Gaussian reverse step for pixels from N(0, variance)."""
    beta, pixel_var = 1 - ab / before, variance * (1 - ab) / (ab * variance + 1 - ab)
    return np.log(beta * (1 - before) / (1 - ab) + before * beta**2 / (1 - ab) ** 2 * pixel_var)


@pytest.mark.parametrize("count", [20, 100, 334, T])
@pytest.mark.parametrize("prediction_type", ["epsilon", "mean"])
def test_learned_variances_of_single_steps_are_converted_to_longer_steps(count, prediction_type):
    # For data N(0, 1/4) and the optimal network, steps of any length keep the marginals exactly, if predicted means
    # and learned variances, which hold for single steps, are converted correctly.
    scheduler = DDPMScheduler(
        variance_type="learned", prediction_type=prediction_type, clip_sample=False, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(count)
    ab = np.cumprod(1 - np.linspace(1e-4, 0.02, T))
    steps, variance = scheduler.timesteps.tolist(), 0.25
    for t, after in zip(steps[:-1], steps[1:], strict=True):
        before = ab[t - 1]
        gain = ab[t] ** 0.5 * variance / (ab[t] * variance + 1 - ab[t])  # E[x_0 | x_t] = gain x_t
        beta = 1 - ab[t] / before
        mean = before**0.5 * beta / (1 - ab[t]) * gain + (ab[t] / before) ** 0.5 * (1 - before) / (1 - ab[t])
        prediction = {"epsilon": (1 - ab[t] ** 0.5 * gain) / (1 - ab[t]) ** 0.5, "mean": mean}[prediction_type]
        one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        log_var = exact_log_var(ab[t], before, variance) * one
        output = torch.cat([prediction * one, log_var], dim=1)
        # Two steps with different noise give the standard deviation and the mean of the step.
        first, second = (
            scheduler.step(output, t, one, generator=torch.Generator().manual_seed(seed)).prev_sample.item()
            for seed in (1, 2)
        )
        z = [torch.randn(1, generator=torch.Generator().manual_seed(k), dtype=torch.float64).item() for k in (1, 2)]
        deviation = (first - second) / (z[0] - z[1])
        drift = first - deviation * z[0]
        marginal, target = (ab[k] * variance + 1 - ab[k] for k in (t, after))
        assert drift**2 * marginal + deviation**2 == pytest.approx(target, rel=1e-6)


def test_fixed_large_log_is_fixed_large():
    # Here diffusers computes the square root of a negative logarithm: NaN.
    x_start, noise = inputs()
    plain, log = (DDPMScheduler(variance_type=name) for name in ("fixed_large", "fixed_large_log"))
    torch.testing.assert_close(step(log, 500, x_start, noise), step(plain, 500, x_start, noise), rtol=0, atol=0)


def test_custom_timesteps():
    ours, theirs = both()
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(timesteps=[900, 500, 20, 0])
    x_start, noise = inputs()
    for t in ours.timesteps:
        torch.testing.assert_close(step(ours, t, x_start, noise), step(theirs, t, x_start, noise), rtol=1e-4, atol=1e-5)
    for steps in ([], [1, 5], [5, 5], [1000, 3], [3, -1]):
        with pytest.raises(ValueError, match="timesteps"):
            ours.set_timesteps(timesteps=steps)
    with pytest.raises(ValueError, match="either"):
        ours.set_timesteps(10, timesteps=[3])


def test_noise_and_velocity_equal_those_of_diffusers():
    ours, theirs = both()
    x_start, noise = torch.randn(2, T, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    t = torch.arange(T)
    torch.testing.assert_close(
        ours.add_noise(x_start, noise, t), theirs.add_noise(x_start, noise, t), rtol=0, atol=1e-5
    )
    actual, expected = ours.get_velocity(x_start, noise, t), theirs.get_velocity(x_start, noise, t)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_bfloat16_images_keep_their_dtype_and_get_noise():
    scheduler = DDPMScheduler()
    x_start, noise = (x.bfloat16() for x in inputs())
    noisy = scheduler.add_noise(x_start, noise, torch.tensor([3]))
    assert noisy.dtype == torch.bfloat16 and not torch.equal(noisy, x_start)
    output = scheduler.step(noise, 500, x_start)
    assert output.prev_sample.dtype == output.pred_original_sample.dtype == torch.bfloat16


@pytest.mark.parametrize("count", [T, 20])
def test_learned_range_equals_that_of_diffusers(count):
    ours, theirs = both(variance_type="learned_range")
    ours.set_timesteps(count)
    theirs.set_timesteps(count)
    x_start, noise = inputs()
    output = torch.cat([noise, noise.flip(0).clamp(-1, 1)], dim=1)
    for t in ours.timesteps:
        x_t = ours.add_noise(x_start, noise, t.view(1))
        tolerance = 2e-4 if t < 50 else 1e-5
        torch.testing.assert_close(step(ours, t, x_t, output), step(theirs, t, x_t, output), rtol=0, atol=tolerance)


def test_learned_variances_are_log_variances():
    # diffusers computes the square root of the network's output, which is NaN for negative log-variances.
    scheduler, (x_start, noise) = DDPMScheduler(variance_type="learned"), inputs()
    log_var = torch.full_like(noise, -3.0)
    noisy = step(scheduler, 500, x_start, torch.cat([noise, log_var], dim=1))
    noiseless = step(scheduler, 500, x_start, torch.cat([noise, log_var - 80], dim=1))
    z = torch.randn(noise.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(noisy - noiseless, torch.tensor(-1.5).exp() * z)
    with pytest.raises(ValueError, match="does not match sample .* with variance_type='learned'; expected 2 channels"):
        step(scheduler, 500, x_start, noise)


@pytest.mark.parametrize("name", ["quad", "const"])
def test_schedules_unknown_to_diffusers_are_saved_as_trained_betas(name):
    ours = DDPMScheduler(beta_schedule=name, num_train_timesteps=50)
    stock = diffusers.DDPMScheduler.from_config(dict(ours.config))
    torch.testing.assert_close(stock.betas, ours.betas)
    torch.testing.assert_close(DDPMScheduler.from_config(stock.config).betas, ours.betas)


@pytest.mark.parametrize("name", ["DDIM", "DPMSolverMultistep", "UniPCMultistep", "PNDM", "EulerDiscrete"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"beta_end": 0.03, "variance_type": "fixed_large", "clip_sample_range": 0.9, "timestep_spacing": "trailing"},
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "steps_offset": 1},
        {"beta_schedule": "const", "num_train_timesteps": 50, "clip_sample": False},
    ],
    ids=["defaults", "range", "cosine", "values"],
)
def test_converting_schedulers_and_back_keeps_every_option(name, config):
    ours = DDPMScheduler(**config)
    other = getattr(diffusers, f"{name}Scheduler").from_config(ours.config)
    assert type(other) in ours.compatibles
    back = DDPMScheduler.from_config(other.config)
    options = [key for key in ours.config if not key.startswith("_")]
    assert {key: back.config[key] for key in options} == {key: ours.config[key] for key in options}


def test_configuration_equals_that_of_diffusers(tmp_path):
    ours, theirs = both(variance_type="fixed_large")
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    file = "scheduler_config.json"
    assert (tmp_path / "ours" / file).read_text() == (tmp_path / "theirs" / file).read_text()


def test_invalid_values_are_rejected_with_expected_ones():
    for name in ("variance_type", "prediction_type", "timestep_spacing", "beta_schedule"):
        with pytest.raises(ValueError, match=f"{name}='nonsense': expected one of "):
            DDPMScheduler(**{name: "nonsense"})
    with pytest.raises(ValueError, match="trained_betas of 2 entries: expected num_train_timesteps=1000 entries"):
        DDPMScheduler(trained_betas=[0.1, 0.2])
    scheduler, (x_start, noise) = DDPMScheduler(), inputs()
    for count in (0, 10.5, 1001):
        with pytest.raises(ValueError, match=f"num_inference_steps={count}: expected 1 to 1000"):
            scheduler.set_timesteps(count)
    scheduler.set_timesteps(10)
    for t in (901, 900.5):
        with pytest.raises(ValueError, match=f"timestep={t}: expected one of the 10 timesteps"):
            scheduler.step(noise, t, x_start)
        with pytest.raises(ValueError, match=f"timestep={t}: expected one of the 10 timesteps"):
            scheduler.previous_timestep(t)
    with pytest.raises(ValueError, match=r"timesteps: 1000 is not in \[0, 1000\)"):
        scheduler.set_timesteps(timesteps=[1000, 0])
    with pytest.raises(ValueError, match="does not match sample"):
        scheduler.step(torch.cat([noise, noise], dim=1), 900, x_start)


@pytest.mark.parametrize("total", [1, 2, 100])
def test_process_of_any_length_ends_at_image(total):
    scheduler, (x_start, noise) = DDPMScheduler(num_train_timesteps=total, clip_sample=False), inputs()
    scheduler.set_timesteps(total)
    x_t = scheduler.add_noise(x_start, noise, scheduler.timesteps[:1])
    for t in scheduler.timesteps:
        eps = scheduler.diffusion.predict_eps(x_start, x_t, int(t))
        x_t, x_start_hat = scheduler.step(eps, t, x_t, return_dict=False)
        torch.testing.assert_close(x_start_hat, x_start, rtol=0, atol=1e-4)
    torch.testing.assert_close(x_t, x_start, rtol=0, atol=1e-5)


def test_sampling_may_start_at_any_timestep():
    # Image to image: diffuse an image to one of the timesteps, then run the reverse process from there.
    ours, theirs = both()
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(20)
    x_start, noise = inputs()
    actual = expected = ours.add_noise(x_start, noise, ours.timesteps[15:16])
    for t in ours.timesteps[15:]:
        actual, expected = step(ours, t, actual, 0.5 * noise), step(theirs, t, expected, 0.5 * noise)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [{}, {"num_inference_steps": 10}, {"timesteps": [900, 500, 3]}], ids=str)
def test_previous_timesteps_have_same_type_as_in_diffusers(steps):
    schedulers = both()
    for scheduler in schedulers if steps else []:
        scheduler.set_timesteps(**steps)
    for t in (900, 0 if "timesteps" not in steps else 3, torch.tensor(500), torch.tensor([900])):
        actual, expected = (scheduler.previous_timestep(t) for scheduler in schedulers)
        assert actual == expected and type(actual) is type(expected)
        assert not steps or actual.shape == expected.shape == ()
    batch = torch.tensor([900, 500])  # not supported by diffusers after set_timesteps
    expected = [899, 499] if not steps else [800, 400] if "timesteps" not in steps else [500, 3]
    assert schedulers[0].previous_timestep(batch).tolist() == expected


@pytest.mark.parametrize("count", [T, 50])
def test_noise_prediction_without_signal(count, tmp_path):
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    diffusers.DDPMScheduler(**options).save_pretrained(tmp_path)
    ours, theirs = DDPMScheduler.from_pretrained(tmp_path), diffusers.DDPMScheduler.from_pretrained(tmp_path)
    assert ours.alphas_cumprod[-1] == 0
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(count)
    x_T, noise = inputs()
    actual, expected = step(ours, T - 1, x_T, noise), step(theirs, T - 1, x_T, noise)
    torch.testing.assert_close(actual, expected, rtol=0, atol=4e-6)
    # The optimal network returns its input, which is pure noise. Then diffusers computes 0 / 0: NaN.
    output = ours.step(x_T, T - 1, x_T, generator=torch.Generator().manual_seed(0))
    assert output.pred_original_sample.abs().max() == 0 and output.prev_sample.isfinite().all()


def test_noise_prediction_without_signal_and_clipping_is_rejected():
    x_T, noise = inputs()
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True, clip_sample=False)
    with pytest.raises(ValueError, match="timestep=999: x_t contains no signal .* set clip_sample=True"):
        scheduler.step(noise, T - 1, x_T)
    scheduler.set_timesteps(timesteps=list(range(T - 2, -1, -1)))  # the remedy of the message
    assert scheduler.step(noise, T - 2, x_T).prev_sample.isfinite().all()
