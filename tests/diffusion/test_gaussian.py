"""The diffusion process compared with theory: tests derive expected values in float64, without the class."""

import pytest
import torch

from hf_ddpm import GaussianDiffusion
from hf_ddpm.diffusion.outputs import dynamic_threshold

T = 1000
BETAS = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
ALPHA_BARS = torch.cumprod(1 - BETAS, dim=0)
ONE = torch.ones(1, 1, 1, 1, dtype=torch.float64)
SUBSET = [0, 3, 50, 51, 400, 998, 999]


@pytest.fixture(params=["whole", "respaced"])
def process(request):
    """A process, and the expected cumulative products of its steps."""
    whole = GaussianDiffusion(BETAS)
    if request.param == "whole":
        return whole, ALPHA_BARS
    return whole.respaced(SUBSET), ALPHA_BARS[SUBSET]


def single_steps(alpha_bars):
    """Return the variances of single steps with the given cumulative products, and the products before each step."""
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bars[:-1]])
    return 1 - alpha_bars / before, before


def test_q_sample_is_composition_of_single_steps(process):
    # Eq. 4 must equal Eq. 2 applied t + 1 times.
    diffusion, alpha_bars = process
    betas, _ = single_steps(alpha_bars)
    mean, variance = 1.0, 0.0
    for t in range(len(diffusion)):
        mean = mean * (1 - betas[t]).sqrt()
        variance = (1 - betas[t]) * variance + betas[t]
        torch.testing.assert_close(diffusion.q_sample(ONE, t, 0 * ONE), mean * ONE, rtol=1e-11, atol=0)
        torch.testing.assert_close(diffusion.q_sample(0 * ONE, t, ONE) ** 2, variance * ONE, rtol=1e-9, atol=0)


def test_q_jump_is_composition_of_single_steps(process):
    diffusion, alpha_bars = process
    betas, _ = single_steps(alpha_bars)
    for first in (-1, 0, 2, len(diffusion) - 2):
        mean, variance = 1.0, 0.0
        for t in range(first + 1, len(diffusion)):
            mean = mean * (1 - betas[t]).sqrt()
            variance = (1 - betas[t]) * variance + betas[t]
            torch.testing.assert_close(diffusion.q_jump(ONE, first, t, 0 * ONE), mean * ONE, rtol=1e-9, atol=0)
            torch.testing.assert_close(diffusion.q_jump(0 * ONE, first, t, ONE) ** 2, variance * ONE, rtol=1e-9, atol=0)


def test_ddim_inverse_is_inverse_of_ddim_step(process):
    diffusion, _ = process
    x_s, eps = 0.3 * ONE, -1.2 * ONE
    for t in (0, 1, len(diffusion) - 1):
        x_t = diffusion.ddim_inverse(eps, x_s, t - 1, t)
        x_start = diffusion.predict_start(eps, x_t, t)
        torch.testing.assert_close(diffusion.ddim_posterior(x_start, x_t, t, 0.0)[0], x_s, rtol=1e-9, atol=0)


def test_q_posterior_follows_from_bayes_theorem(process):
    # q(x_{t-1} | x_t, x_0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x_0): precisions add up, and so do
    # precision-weighted means. At t = 0 the second factor is a single point.
    diffusion, alpha_bars = process
    betas, before = single_steps(alpha_bars)
    x_start, x_t = 0.3 * ONE, -1.2 * ONE
    for t in range(1, len(diffusion)):
        precision = (1 - betas[t]) / betas[t] + 1 / (1 - before[t])
        weighted = (1 - betas[t]).sqrt() / betas[t] * x_t + before[t].sqrt() / (1 - before[t]) * x_start
        mean, log_var = diffusion.q_posterior(x_start, x_t, t)
        torch.testing.assert_close(mean, weighted / precision, rtol=1e-9, atol=0)
        assert log_var == pytest.approx(-precision.log().item(), rel=1e-9)
    torch.testing.assert_close(diffusion.q_posterior(x_start, x_t, 0)[0], x_start, rtol=1e-12, atol=0)


def test_reverse_mean_is_equation_11():
    diffusion = GaussianDiffusion(BETAS)
    x_t, eps = 0.7 * ONE, -0.4 * ONE
    for t in range(T):
        expected = (x_t - BETAS[t] / (1 - ALPHA_BARS[t]).sqrt() * eps) / (1 - BETAS[t]).sqrt()
        mean, _ = diffusion.q_posterior(diffusion.predict_start(eps, x_t, t), x_t, t)
        torch.testing.assert_close(mean, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "mean", "v_prediction"])
def test_exact_prediction_recovers_image(process, prediction_type):
    diffusion, _ = process
    generator = torch.Generator().manual_seed(0)
    t = torch.arange(len(diffusion))
    x_start, noise = torch.randn(2, len(t), 1, 2, 2, generator=generator, dtype=torch.float64)
    x_t = diffusion.q_sample(x_start, t, noise)
    target = diffusion.target(x_start, t, noise, prediction_type)
    estimate = diffusion.predict_start(target, x_t, t, prediction_type)
    torch.testing.assert_close(estimate, x_start, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(diffusion.predict_eps(x_start, x_t, t), noise, rtol=1e-9, atol=1e-9)


def test_v_is_angular_velocity():
    # With signal = cos(phi) and noise = sin(phi), v is the derivative of x_t along phi (Salimans & Ho 2022, App. D).
    diffusion, t, h = GaussianDiffusion(BETAS), 300, 1e-6
    x_start, noise = 0.3 * ONE, -0.8 * ONE
    phi = torch.acos(ALPHA_BARS[t].sqrt())
    x = [(phi + s).cos() * x_start + (phi + s).sin() * noise for s in (-h, h)]
    torch.testing.assert_close(diffusion.target(x_start, t, noise, "v_prediction"), (x[1] - x[0]) / (2 * h))


def test_fixed_log_variances_are_those_of_beta_and_beta_tilde():
    diffusion = GaussianDiffusion(BETAS)
    beta_tilde_1 = (1 - ALPHA_BARS[0]) / (1 - ALPHA_BARS[1]) * BETAS[1]
    assert beta_tilde_1.item() == pytest.approx(5.453188e-5, rel=1e-6)
    for t in range(T):
        small, large = (diffusion.log_var(t, ONE, f"fixed_{size}") for size in ("small", "large"))
        beta_tilde = (1 - ALPHA_BARS[t - 1]) / (1 - ALPHA_BARS[t]) * BETAS[t] if t > 0 else beta_tilde_1
        assert small == pytest.approx(beta_tilde.log().item(), rel=1e-9)
        assert large == pytest.approx((BETAS[t] if t > 0 else beta_tilde_1).log().item(), rel=1e-12)


def test_full_sampling_of_standard_normal_data():
    # For x_0 ~ N(0, I) the optimal denoiser is E[x_0 | x_t] = sqrt(alpha_bar_t) x_t: each reverse step is linear, and
    # the variance of x_t is known exactly. With fixed_large it stays 1 until the last step, without noise, subtracts
    # beta_0. The result depends on every coefficient of every step.
    diffusion, variance = GaussianDiffusion(BETAS), 1.0
    for t in reversed(range(T)):
        gain, _ = diffusion.q_posterior(ALPHA_BARS[t].sqrt() * ONE, ONE, t)
        added = torch.tensor(diffusion.log_var(t, ONE, "fixed_large")).exp() if t > 0 else 0.0
        variance = gain.item() ** 2 * variance + float(added)
    assert variance == pytest.approx(1 - BETAS[0].item(), rel=1e-6)


def test_full_sampling_of_single_point(process):
    # If all data are the same point, the optimal denoiser returns it, and fixed_small makes the reverse steps exact:
    # the marginals of sampling are those of the forward process.
    diffusion, alpha_bars = process
    point, mean, variance = 0.6, 0.6 * alpha_bars[-1].sqrt().item(), 1 - alpha_bars[-1].item()
    for t in reversed(range(1, len(diffusion))):
        offset, log_var = diffusion.q_posterior(point * ONE, 0 * ONE, t)
        gain = diffusion.q_posterior(0 * ONE, ONE, t)[0].item()
        assert log_var == diffusion.log_var(t, ONE, "fixed_small")
        mean = gain * mean + offset.item()
        variance = gain**2 * variance + float(torch.tensor(log_var, dtype=torch.float64).exp())
        assert mean == pytest.approx(point * alpha_bars[t - 1].sqrt().item(), rel=1e-8)
        assert variance == pytest.approx(1 - alpha_bars[t - 1].item(), rel=1e-8)


def test_respaced_process_keeps_marginals_and_original_timesteps():
    whole = GaussianDiffusion(BETAS)
    respaced = whole.respaced(list(reversed(SUBSET)))
    assert respaced.timesteps.tolist() == SUBSET
    torch.testing.assert_close(respaced.alphas_cumprod, ALPHA_BARS[SUBSET], rtol=1e-11, atol=0)
    torch.testing.assert_close(torch.cumprod(1 - respaced.betas, 0), ALPHA_BARS[SUBSET], rtol=1e-12, atol=0)
    assert respaced.respaced([1, 4]).timesteps.tolist() == [3, 400]
    torch.testing.assert_close(whole.respaced(range(T)).betas, BETAS, rtol=1e-9, atol=1e-14)


def test_timesteps_as_int_and_as_tensor_agree():
    diffusion = GaussianDiffusion(BETAS)
    x_start, noise = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    for t in (0, 500, 999):
        x_t = diffusion.q_sample(x_start, torch.full((3,), t), noise)
        torch.testing.assert_close(x_t, diffusion.q_sample(x_start, t, noise), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_images_are_diffused_in_float32(dtype):
    # In bfloat16, alpha_bar_t rounds to 1 at the first ten timesteps, so 1 - alpha_bar_t is 0: no noise.
    diffusion, t = GaussianDiffusion(BETAS), torch.arange(10)
    x_start, noise = torch.randn(2, 10, 1, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    x_t = diffusion.q_sample(x_start, t, noise)
    expected = diffusion.q_sample(x_start.float(), t, noise.float())
    assert x_t.dtype == torch.float32
    torch.testing.assert_close(x_t, expected, rtol=0, atol=0)
    assert bool((x_t != x_start).any(dim=(1, 2, 3)).all())


def test_float32_results_use_float64_coefficients():
    diffusion, t = GaussianDiffusion(BETAS), torch.arange(T)
    one = torch.ones(T, 1, 1, 1)
    x_t = diffusion.q_sample(0 * one, t, one).flatten().double()
    torch.testing.assert_close(x_t, (1 - ALPHA_BARS).sqrt(), rtol=1e-7, atol=0)


def test_invalid_arguments_are_rejected():
    diffusion = GaussianDiffusion(BETAS)
    for betas in ([], [0.1, 0.0], [0.1, 1.1], [float("nan")]):
        with pytest.raises(ValueError, match="betas"):
            GaussianDiffusion(betas)
    for timesteps in ([], [0, 0], [-1, 3], [1000]):
        with pytest.raises(ValueError, match="timesteps"):
            diffusion.respaced(timesteps)
    for t in (-1, 1000):
        with pytest.raises(ValueError, match=f"t={t}"):
            diffusion.q_sample(ONE, t, ONE)
    with pytest.raises(ValueError, match="prediction_type='eps': expected one of epsilon"):
        diffusion.target(ONE, 0, ONE, "eps")
    with pytest.raises(ValueError, match="prediction_type='eps'"):
        diffusion.predict_start(ONE, ONE, 0, "eps")
    with pytest.raises(ValueError, match="variance_type='learnt': expected one of fixed_small"):
        diffusion.log_var(0, ONE, "learnt")
    for s, t, message in ((3, 3, r"t=3 is not in \[4, "), (-2, 3, r"t=-2 is not in \[-1, "), (0, 1000, r"t=1000 is")):
        with pytest.raises(ValueError, match=message):
            diffusion.q_jump(ONE, s, t, ONE)
        with pytest.raises(ValueError, match=message):
            diffusion.ddim_inverse(ONE, ONE, s, t)
    with pytest.raises(ValueError, match="variance_type='learned': expected a network output with twice the channels"):
        diffusion.log_var(0, ONE, "learned")


def test_score_is_gradient_of_log_density():
    # For x_0 ~ N(m, s^2) the marginal is N(sqrt(a) m, a s^2 + 1 - a). The optimal noise prediction E[eps | x_t] is
    # computed from the posterior mean of x_0, without Tweedie's formula.
    diffusion, m, s2 = GaussianDiffusion(BETAS), 0.4, 0.25
    for t in (0, 100, 999):
        a, x_t = ALPHA_BARS[t], torch.full((1, 1, 1, 1), -0.7, dtype=torch.float64, requires_grad=True)
        marginal = torch.distributions.Normal(a.sqrt() * m, (a * s2 + 1 - a).sqrt())
        (expected,) = torch.autograd.grad(marginal.log_prob(x_t).sum(), x_t)
        x_start = m + a.sqrt() * s2 / (a * s2 + 1 - a) * (x_t.detach() - a.sqrt() * m)
        eps = diffusion.predict_eps(x_start, x_t.detach(), t)
        torch.testing.assert_close(diffusion.score(eps, t), expected, rtol=1e-9, atol=0)


def test_dynamic_threshold_scales_only_saturated_images():
    flat = torch.linspace(-0.5, 0.5, 100).view(1, 1, 10, 10)
    images = torch.cat([flat, 4 * flat, 40 * flat])
    bounded = dynamic_threshold(images, ratio=1.0, max_value=10.0)
    torch.testing.assert_close(bounded[0], images[0])  # within [-1, 1]: unchanged
    torch.testing.assert_close(bounded[1], images[1] / 2)  # up to 2: scaled
    torch.testing.assert_close(bounded[2], images[2].clamp(-10, 10) / 10)  # up to 20: limited by max_value
