"""Terms of the bound: divergences compared with quadrature, sums of bins, identities of the paper."""

import math

import pytest
import torch

from hf_ddpm import GaussianDiffusion
from hf_ddpm.diffusion.likelihood import bound_nats, decoder_log_likelihood, gaussian_kl, prior_nats

T = 1000
BETAS = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
ALPHA_BARS = torch.cumprod(1 - BETAS, dim=0)
DIFFUSION = GaussianDiffusion(BETAS)


def constant(value):
    return torch.full((1, 1, 1, 1), value, dtype=torch.float64)


def draw(count=6):
    generator = torch.Generator().manual_seed(0)
    x_start = torch.rand(count, 1, 4, 4, generator=generator, dtype=torch.float64) * 2 - 1
    noise, error = torch.randn(2, count, 1, 4, 4, generator=generator, dtype=torch.float64)
    return x_start, noise, error


def test_gaussian_kl_equals_its_integral():
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    p = torch.distributions.Normal(torch.tensor(0.4, dtype=torch.float64), math.exp(0.25))
    q = torch.distributions.Normal(torch.tensor(-0.3, dtype=torch.float64), math.exp(-0.4))
    integral = torch.trapezoid(q.log_prob(x).exp() * (q.log_prob(x) - p.log_prob(x)), x)
    divergence = gaussian_kl(constant(-0.3), -0.8, constant(0.4), 0.5)
    torch.testing.assert_close(divergence.squeeze(), integral, rtol=1e-9, atol=0)
    assert gaussian_kl(constant(0.2), -3.0, constant(0.2), -3.0).item() == 0


@pytest.mark.parametrize("levels", [256, 17])
@pytest.mark.parametrize("deviation", [0.003, 0.01, 0.3])
def test_probabilities_of_all_levels_sum_to_one(levels, deviation):
    values = torch.linspace(-1, 1, levels, dtype=torch.float64)
    for mean in (-1.2, -1.0, 0.031, 1.0):
        log_p = decoder_log_likelihood(values, torch.full_like(values, mean), 2 * math.log(deviation), levels)
        # Probabilities are clamped to at least 1e-12.
        assert log_p.exp().sum().item() == pytest.approx(1, abs=levels * 1e-12)


def test_probability_of_level_is_normal_distribution_over_its_bin():
    # The error of the paper's approximation of the distribution function is at most 3e-4.
    values = torch.linspace(-1, 1, 256, dtype=torch.float64)
    normal = torch.distributions.Normal(0.1, 0.05)
    edges = torch.cat([torch.tensor([-9.0]), (values[1:] + values[:-1]) / 2, torch.tensor([9.0])])
    expected = normal.cdf(edges[1:]) - normal.cdf(edges[:-1])
    probability = decoder_log_likelihood(values, torch.full_like(values, 0.1), 2 * math.log(0.05)).exp()
    torch.testing.assert_close(probability, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(probability.cumsum(0), expected.cumsum(0), rtol=0, atol=3e-4)


def test_terms_of_linear_schedule():
    bits = 1 / math.log(2)
    log_var = DIFFUSION.log_var(0, constant(0.0), "fixed_large")
    # L_0 for an exact mean in an inner bin: 1.3054, or up to 3e-4 more with the approximate distribution function.
    exact = -math.log2(math.erf(1 / 255 / math.sqrt(2 * 5.453188e-5)))
    decoder = -decoder_log_likelihood(constant(0.0), constant(0.0), log_var).item() * bits
    assert exact == pytest.approx(1.3054, abs=1e-4) and decoder == pytest.approx(exact, abs=3e-4)
    # With the variance beta_0 it would be 1.7128.
    wrong = -decoder_log_likelihood(constant(0.0), constant(0.0), math.log(1e-4)).item() * bits
    assert wrong == pytest.approx(1.7128, abs=3e-4)
    # L_T for natural images, whose pixels have a mean square of about 0.25.
    assert prior_nats(DIFFUSION, constant(0.5)).item() * bits == pytest.approx(9e-6, abs=3e-6)
    # Cost of the variance beta_t if beta-tilde_t is exact, summed over t.
    zero = constant(0.0)
    terms = [gaussian_kl(zero, DIFFUSION.log_var(t, zero, "fixed_small"), zero,
                         DIFFUSION.log_var(t, zero, "fixed_large")).item() for t in range(1, T)]  # fmt: skip
    assert sum(terms) * bits == pytest.approx(0.4864, abs=1e-4)


def test_prior_is_divergence_of_last_marginal():
    a = ALPHA_BARS[-1].item()
    for x in (-1.0, 0.3):
        expected = 0.5 * (a * x**2 + (1 - a) - 1 - math.log(1 - a))
        assert prior_nats(DIFFUSION, constant(x)).item() == pytest.approx(expected, rel=1e-6)


def terms(x_start, x_start_hat, noise, t, variance_type):
    times = torch.full((len(x_start),), t)
    x_t = DIFFUSION.q_sample(x_start, times, noise)
    log_var = DIFFUSION.log_var(times, x_t, variance_type)
    mean, _ = DIFFUSION.q_posterior(x_start_hat(x_t, times), x_t, times)
    return bound_nats(DIFFUSION, x_start, mean, x_t, times, log_var)


def test_divergences_are_zero_for_true_noise():
    x_start, noise, _ = draw()
    for t in range(1, T):
        bound = terms(x_start, lambda x_t, t: DIFFUSION.predict_start(noise, x_t, t), noise, t, "fixed_small")
        torch.testing.assert_close(bound, torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_cost_of_noise_errors_is_equation_12(variance_type):
    x_start, noise, error = draw()
    betas, before = BETAS, torch.cat([torch.ones(1, dtype=torch.float64), ALPHA_BARS[:-1]])
    tilde = betas * (1 - before) / (1 - ALPHA_BARS)
    for t in range(1, T):
        sigma2 = {"fixed_small": tilde, "fixed_large": betas}[variance_type][t]
        weight = betas[t] ** 2 / (2 * sigma2 * (1 - betas[t]) * (1 - ALPHA_BARS[t]))
        ratio = tilde[t] / sigma2
        expected = weight * error.square().flatten(1).mean(dim=1) + (ratio - 1 - ratio.log()) / 2
        bound = terms(x_start, lambda x_t, t: DIFFUSION.predict_start(noise + error, x_t, t), noise, t, variance_type)
        torch.testing.assert_close(bound, expected, rtol=1e-7, atol=1e-12)


def test_first_term_is_decoder():
    x_start, noise, error = draw()
    bound = terms(x_start, lambda x_t, t: x_start + 0.01 * error, noise, 0, "fixed_small")
    # At t = 0 the mean is the estimate itself.
    log_p = decoder_log_likelihood(x_start, x_start + 0.01 * error, math.log(5.453188e-5))
    torch.testing.assert_close(bound, -log_p.flatten(1).mean(dim=1), rtol=1e-5, atol=0)
