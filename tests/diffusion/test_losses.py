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
def test_simple_is_the_mean_squared_error_an_image_and_zero_for_the_target(batch, prediction_type):
    inputs, output, _ = batch
    objective = Objective("simple", prediction_type)
    target = DIFFUSION.target(inputs["x_start"], inputs["t"], inputs["noise"], prediction_type)
    assert evaluate(objective, inputs, target).abs().max() == 0
    expected = torch.stack([((o - g) ** 2).mean() for o, g in zip(output, target, strict=True)])
    torch.testing.assert_close(evaluate(objective, inputs, output), expected)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_min_snr_is_one_objective_whatever_is_predicted(batch, prediction_type):
    # Its weight of an error of the image is min(SNR, 5); an error of the noise or of v is that error, scaled.
    inputs, output, _ = batch
    a = DIFFUSION.alphas_cumprod[inputs["t"]].float()
    image_error = (
        DIFFUSION.predict_start(output, inputs["x_t"], inputs["t"], prediction_type) - inputs["x_start"]
    ) ** 2
    expected = (a / (1 - a)).clamp(max=5) * image_error.flatten(1).mean(dim=1)
    found = evaluate(Objective("min_snr", prediction_type), inputs, output)
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_truncated_snr_is_the_larger_error_of_image_and_noise_whatever_is_predicted(batch, prediction_type):
    inputs, output, _ = batch
    a = DIFFUSION.alphas_cumprod[inputs["t"]].float().view(-1, 1, 1, 1)
    assert (a > 0.5).any() and (a < 0.5).any()
    x_hat = DIFFUSION.predict_start(output, inputs["x_t"], inputs["t"], prediction_type)
    noise_hat = (inputs["x_t"] - a.sqrt() * x_hat) / (1 - a).sqrt()
    errors = [(x_hat - inputs["x_start"]) ** 2, (noise_hat - inputs["noise"]) ** 2]
    expected = torch.maximum(*(error.flatten(1).mean(dim=1) for error in errors))
    found = evaluate(Objective("truncated_snr", prediction_type), inputs, output)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_min_snr_is_finite_where_there_is_no_signal():
    diffusion = GaussianDiffusion([0.1, 0.5, 1.0])
    x, t = torch.randn(1, 1, 2, 2), torch.tensor([2])
    for name, expected in [("sample", 0.0), ("v_prediction", 0.0)]:
        loss = Objective("min_snr", name)(diffusion, x + 1, x, t, x, diffusion.q_sample(x, t, x))
        assert loss.item() == expected


def test_vlb_estimates_the_bound(batch):
    inputs, output, _ = batch
    x_hat = DIFFUSION.predict_start(output, inputs["x_t"], inputs["t"])
    log_var = DIFFUSION.log_var(inputs["t"], x_hat, "fixed_small")
    mean, _ = DIFFUSION.q_posterior(x_hat, inputs["x_t"], inputs["t"])
    expected = T * bound_nats(DIFFUSION, inputs["x_start"], mean, inputs["x_t"], inputs["t"], log_var)
    torch.testing.assert_close(evaluate(Objective("vlb", variance_type="fixed_small"), inputs, output), expected)


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_hybrid_trains_the_mean_by_simple_and_the_variance_by_the_bound(batch, variance_type):
    inputs, output, variance_output = batch
    both = torch.cat([output, variance_output], dim=1).requires_grad_()
    gradients = {}
    for name in ("hybrid", "vlb"):
        loss = evaluate(Objective(name, variance_type=variance_type), inputs, both).sum()
        gradients[name] = split_output(torch.autograd.grad(loss, both)[0], 1)
    simple = evaluate(Objective("simple"), inputs, both[:, :1]).sum()
    torch.testing.assert_close(gradients["hybrid"][0], torch.autograd.grad(simple, both)[0][:, :1])
    # 0.001 times the bound in bits, as in the code of Nichol & Dhariwal; in nats it is 1.44 times as much.
    torch.testing.assert_close(gradients["hybrid"][1], 0.001 / math.log(2) * gradients["vlb"][1])
    assert gradients["hybrid"][1].abs().max() > 0


def test_the_best_learned_variance_is_that_of_the_error():
    # For a mean that is off by e the bound is least at sigma^2 = beta-tilde + e^2: setting the derivative to zero.
    t = torch.tensor([50])
    x_start, x_t = torch.zeros(1, 1, 1, 1, dtype=torch.float64), torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64)
    x_hat = x_start + 0.3
    (mean, log_tilde), (off, _) = (DIFFUSION.q_posterior(x, x_t, t) for x in (x_start, x_hat))
    best = (log_tilde.exp() + (mean - off) ** 2).log().requires_grad_()
    bound_nats(DIFFUSION, x_start, off, x_t, t, best).sum().backward()
    assert abs(best.grad.item()) < 1e-12


def test_learned_range_runs_between_the_two_fixed_variances():
    x = torch.zeros(T, 1, 1, 1)
    t = torch.arange(T)
    for output, name in [(-1.0, "fixed_small"), (1.0, "fixed_large")]:
        found = DIFFUSION.log_var(t, x, "learned_range", torch.full_like(x, output))
        expected = DIFFUSION.log_var(t, x, name)
        torch.testing.assert_close(found[1:], expected[1:])  # at t = 0 its upper end is beta_0 itself
    assert DIFFUSION.log_var(t, x, "learned", x + 3).eq(3).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mse",), "objective='mse' is not allowed: one of simple, vlb, hybrid, min_snr"),
        (("simple", "epsilon", "learned"), "'simple' is not allowed with variance_type='learned': one of vlb, hybrid"),
        (("hybrid", "epsilon", "fixed_small"), "'hybrid' is not allowed with variance_type='fixed_small'"),
        (("min_snr", "mean"), "'min_snr' is not allowed with prediction_type='mean'"),
        (("truncated_snr", "mean"), "'truncated_snr' is not allowed with prediction_type='mean'"),
    ],
)
def test_combinations_that_train_nothing_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Objective(*arguments)
