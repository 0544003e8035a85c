import math

import pytest
import torch

from hf_ddpm import GaussianDiffusion
from hf_ddpm.diffusion.likelihood import bound_nats
from hf_ddpm.diffusion.losses import Objective
from hf_ddpm.diffusion.outputs import split_output

T = 100
DIFFUSION = GaussianDiffusion(torch.linspace(1e-3, 0.2, T, dtype=torch.float64))


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    x_start = torch.rand(8, 1, 4, 4, generator=generator) * 2 - 1
    noise, output, variance_output = torch.randn(3, 8, 1, 4, 4, generator=generator)
    t = torch.tensor([0, 1, 2, 10, 30, 60, 98, 99])
    return (
        {"x_start": x_start, "noise": noise, "t": t, "x_t": DIFFUSION.q_sample(x_start, t, noise)},
        output,
        variance_output,
    )


def evaluate(objective, batch, output):
    return objective(DIFFUSION, output, **batch)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "mean", "v_prediction"])
def test_simple_is_mean_squared_error_per_image(batch, prediction_type):
    inputs, output, _ = batch
    objective = Objective("simple", prediction_type)
    target = DIFFUSION.target(inputs["x_start"], inputs["t"], inputs["noise"], prediction_type)
    assert evaluate(objective, inputs, target).abs().max() == 0
    expected = torch.stack([((o - g) ** 2).mean() for o, g in zip(output, target, strict=True)])
    torch.testing.assert_close(evaluate(objective, inputs, output), expected)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_min_snr_is_same_for_all_prediction_types(batch, prediction_type):
    # The squared error of the image has the weight min(SNR, 5).
    inputs, output, _ = batch
    a = DIFFUSION.alphas_cumprod[inputs["t"]].float()
    image_error = (
        DIFFUSION.predict_start(output, inputs["x_t"], inputs["t"], prediction_type) - inputs["x_start"]
    ) ** 2
    expected = (a / (1 - a)).clamp(max=5) * image_error.flatten(1).mean(dim=1)
    loss = evaluate(Objective("min_snr", prediction_type), inputs, output)
    torch.testing.assert_close(loss, expected, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_truncated_snr_is_larger_error_of_image_and_noise(batch, prediction_type):
    inputs, output, _ = batch
    a = DIFFUSION.alphas_cumprod[inputs["t"]].float().view(-1, 1, 1, 1)
    assert (a > 0.5).any() and (a < 0.5).any()
    x_hat = DIFFUSION.predict_start(output, inputs["x_t"], inputs["t"], prediction_type)
    noise_hat = (inputs["x_t"] - a.sqrt() * x_hat) / (1 - a).sqrt()
    errors = [(x_hat - inputs["x_start"]) ** 2, (noise_hat - inputs["noise"]) ** 2]
    expected = torch.maximum(*(error.flatten(1).mean(dim=1) for error in errors))
    loss = evaluate(Objective("truncated_snr", prediction_type), inputs, output)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-4)


def test_min_snr_is_finite_without_signal():
    diffusion = GaussianDiffusion([0.1, 0.5, 1.0])
    x, t = torch.randn(1, 1, 2, 2), torch.tensor([2])
    for name, expected in [("sample", 0.0), ("v_prediction", 0.0)]:
        loss = Objective("min_snr", name)(diffusion, x + 1, x, t, x, diffusion.q_sample(x, t, x))
        assert loss.item() == expected


def test_vlb_estimates_bound(batch):
    inputs, output, _ = batch
    x_hat = DIFFUSION.predict_start(output, inputs["x_t"], inputs["t"])
    log_var = DIFFUSION.log_var(inputs["t"], x_hat, "fixed_small")
    mean, _ = DIFFUSION.q_posterior(x_hat, inputs["x_t"], inputs["t"])
    expected = T * bound_nats(DIFFUSION, inputs["x_start"], mean, inputs["x_t"], inputs["t"], log_var)
    torch.testing.assert_close(evaluate(Objective("vlb", variance_type="fixed_small"), inputs, output), expected)


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_hybrid_trains_mean_by_simple_and_variance_by_bound(batch, variance_type):
    inputs, output, variance_output = batch
    both = torch.cat([output, variance_output], dim=1).requires_grad_()
    gradients = {}
    for name in ("hybrid", "vlb"):
        loss = evaluate(Objective(name, variance_type=variance_type), inputs, both).sum()
        gradients[name] = split_output(torch.autograd.grad(loss, both)[0], 1)
    simple = evaluate(Objective("simple"), inputs, both[:, :1]).sum()
    torch.testing.assert_close(gradients["hybrid"][0], torch.autograd.grad(simple, both)[0][:, :1])
    # 0.001 times the bound in bits, as in the code of Nichol & Dhariwal; for a bound in nats divide by log 2.
    torch.testing.assert_close(gradients["hybrid"][1], 0.001 / math.log(2) * gradients["vlb"][1])
    assert gradients["hybrid"][1].abs().max() > 0


def test_optimal_learned_variance_includes_error_of_mean():
    # If the mean has an error e, the derivative of the bound is zero at sigma^2 = beta-tilde + e^2.
    t = torch.tensor([50])
    x_start, x_t = torch.zeros(1, 1, 1, 1, dtype=torch.float64), torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64)
    x_hat = x_start + 0.3
    (mean, log_tilde), (wrong_mean, _) = (DIFFUSION.q_posterior(x, x_t, t) for x in (x_start, x_hat))
    optimum = (log_tilde.exp() + (mean - wrong_mean) ** 2).log().requires_grad_()
    bound_nats(DIFFUSION, x_start, wrong_mean, x_t, t, optimum).sum().backward()
    assert abs(optimum.grad.item()) < 1e-12


def test_learned_range_interpolates_two_fixed_variances():
    x = torch.zeros(T, 1, 1, 1)
    t = torch.arange(T)
    for output, name in [(-1.0, "fixed_small"), (1.0, "fixed_large")]:
        log_var = DIFFUSION.log_var(t, x, "learned_range", torch.full_like(x, output))
        expected = DIFFUSION.log_var(t, x, name)
        torch.testing.assert_close(log_var[1:], expected[1:])  # at t = 0 the upper end is beta_0
    assert DIFFUSION.log_var(t, x, "learned", x + 3).eq(3).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mse",), "objective='mse': expected one of simple, vlb, hybrid, min_snr"),
        (("simple", "epsilon", "learned"), "='simple': .*variance_type='learned'; expected one of vlb, hybrid"),
        (("hybrid", "epsilon", "fixed_small"), "='hybrid': .*variance_type='fixed_small'; expected one of simple"),
        (("min_snr", "mean"), "='min_snr': not supported with prediction_type='mean'; expected simple or vlb"),
        (("truncated_snr", "mean"), "='truncated_snr': not supported with prediction_type='mean'"),
    ],
)
def test_unsupported_combinations_are_rejected(arguments, message):
    with pytest.raises(ValueError, match=message):
        Objective(*arguments)
