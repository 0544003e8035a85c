import json
import math

import numpy as np
import pytest
import torch

from hf_ddpm import DDPMPipeline, DDPMScheduler, UNet2DModel
from hf_ddpm.config import DataConfig
from hf_ddpm.data.store import load_images
from hf_ddpm.evaluation.nll import Bound, _edges, variational_bound
from hf_ddpm.utils.seeds import BOUND_NOISE, derived_seed, hashed_keys, normal_noise
from tests.conftest import TINY_UNET, load_script

SEED = 3


@pytest.fixture(scope="module")
def digits():
    return load_images(DataConfig("digits", split="test", resolution=[8], channels=1))


def network(variance_type):
    torch.manual_seed(1)
    return UNet2DModel(**{**TINY_UNET, "out_channels": 2 if variance_type == "learned_range" else 1}).eval()


def cdf(z):
    return 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


def independent_bound(unet, levels_of_images, variance_type, images, total):
    """Compute the bound of Eq. 5 from its formulas in float64 numpy, with the same noise and network."""
    betas = np.linspace(1e-4, 0.02, total)
    bars = np.cumprod(1 - betas)
    before = np.append(1.0, bars[:-1])
    tilde = betas * (1 - before) / (1 - bars)
    tilde[0] = tilde[1]
    terms, prior = np.zeros(total), 0.0
    for index, levels in zip(images, levels_of_images, strict=True):
        x0 = levels.astype(np.float64) / 8 - 1  # level 0..16 on [-1, 1]
        shape = (1, *x0.shape)
        steps = torch.arange(total, dtype=torch.int32)
        keys = hashed_keys(derived_seed(SEED, BOUND_NOISE), torch.full_like(steps, index), steps)
        eps = normal_noise(keys, shape[1:]).double().numpy()
        root, noise = (np.sqrt(v).reshape(-1, 1, 1, 1) for v in (bars, 1 - bars))
        xt = root * x0 + noise * eps
        with torch.no_grad():
            output = unet(torch.tensor(xt, dtype=torch.float32), torch.arange(total)).sample.double().numpy()
        x0_hat = np.clip((xt - noise * output[:, :1]) / root, -1, 1)
        for t in range(total):
            c1 = np.sqrt(before[t]) * betas[t] / (1 - bars[t])
            c2 = np.sqrt(1 - betas[t]) * (1 - before[t]) / (1 - bars[t])
            true, mean = c1 * x0 + c2 * xt[t], c1 * x0_hat[t] + c2 * xt[t]
            if variance_type == "fixed_small":
                log_var = np.log(tilde[t])
            elif variance_type == "fixed_large":
                log_var = np.log(betas[t] if t > 0 else tilde[0])
            else:
                u = (output[t, 1:] + 1) / 2
                log_var = u * np.log(betas[t]) + (1 - u) * np.log(tilde[t])
            if t == 0:
                s = np.exp(-0.5 * log_var)
                upper, lower = cdf(s * (x0 - mean + 1 / 16)), cdf(s * (x0 - mean - 1 / 16))
                p = np.where(x0 < -0.99, upper, np.where(x0 > 0.99, 1 - lower, upper - lower))
                terms[t] += -np.log(np.maximum(p, 1e-12)).mean()
            else:
                kl = 0.5 * (log_var - np.log(tilde[t]) - 1 + (tilde[t] + (true - mean) ** 2) / np.exp(log_var))
                terms[t] += kl.mean()
        prior += 0.5 * (bars[-1] * x0**2 + (1 - bars[-1]) - 1 - np.log(1 - bars[-1])).mean()
    count = len(images) * math.log(2)
    return terms / count, prior / count


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
def test_terms_equal_those_of_independent_implementation(digits, variance_type):
    unet, ids = network(variance_type), [0, 7, 31]
    pixels = digits[torch.tensor(ids)].numpy()
    levels = np.round(pixels.astype(np.float64) * 16 / 255)
    terms, prior = independent_bound(unet, levels, variance_type, ids, 1000)
    scheduler = DDPMScheduler(variance_type=variance_type)
    pipe = DDPMPipeline(unet, scheduler)
    report = variational_bound(pipe, digits, ids, seed=SEED, batch_size=100, levels=17).report()
    np.testing.assert_allclose(report["terms_bpd"], terms, rtol=0, atol=1e-4)
    assert report["prior_bpd"] == pytest.approx(prior, abs=1e-8)
    assert report["total_bpd"] == pytest.approx(terms.sum() + prior, abs=1e-4)
    assert report["total_bpd"] == pytest.approx(report["prior_bpd"] + report["vlb_bpd"] + report["decoder_bpd"])
    # Fig. 5: at the last step of the reverse process, all bits except L_0 have been received; at the first, only L_T.
    assert report["rate_bpd"][0] == pytest.approx(report["prior_bpd"] + report["vlb_bpd"])
    assert report["rate_bpd"][-1] == pytest.approx(report["prior_bpd"])
    assert not report["is_estimate"]


@pytest.fixture(scope="module")
def small():
    scheduler = DDPMScheduler(num_train_timesteps=20, beta_start=5e-3, beta_end=0.5)
    return DDPMPipeline(network("fixed_small"), scheduler)


def bound(small, digits, ids, **options):
    return variational_bound(small, digits, ids, **{"seed": 0, "batch_size": 64, "levels": 17, **options})


def test_bound_is_independent_of_batch_size_and_processes(small, digits):
    alone = bound(small, digits, range(10)).report()
    batches = bound(small, digits, range(10), batch_size=7).report()
    parts = [bound(small, digits, range(10)[rank::3]) for rank in range(3)]
    sums = [sum(values) for values in zip(*(vars(part).values() for part in parts), strict=True)]
    together = Bound(*sums).report()
    for other in (batches, together):
        np.testing.assert_allclose(other["terms_bpd"], alone["terms_bpd"], rtol=1e-5)
        assert other["num_images"] == 10


def test_standard_error_over_images(small, digits):
    alone = [bound(small, digits, [i]).report() for i in range(12)]
    totals = np.array([report["total_bpd"] for report in alone])
    report = bound(small, digits, range(12)).report()
    assert report["standard_error"] == pytest.approx(totals.std(ddof=1) / math.sqrt(12), rel=1e-6)
    assert "standard_error" not in alone[0]  # undefined for one image


@pytest.mark.parametrize(("total", "intervals"), [(1000, 29), (1000, 999), (1000, 1), (20, 19), (20, 18), (1000, 500)])
def test_intervals_cover_each_step_once(total, intervals):
    edges = _edges(total, intervals)
    assert edges[0] == 1 and edges[-1] == total and len(edges) == intervals + 1
    assert all(first < end for first, end in zip(edges, edges[1:], strict=False))


def test_standard_error_includes_randomness_of_steps(small, digits):
    runs = [bound(small, digits, range(100), steps_per_image=4, seed=seed).report() for seed in range(20)]
    exact = bound(small, digits, range(100)).report()
    spread = np.std([run["total_bpd"] for run in runs], ddof=1)
    # The standard error also includes the variation between images, but all runs use the same images.
    between_images = exact["standard_error"]
    noise = np.sqrt(np.mean([run["standard_error"] ** 2 for run in runs]) - between_images**2)
    assert noise == pytest.approx(spread, rel=0.5)


def test_estimate_from_fewer_steps_is_unbiased_and_marked(small, digits):
    # Over many images, the estimate from 4 of 20 steps must be within 5 standard errors of the exact value.
    ids = range(300)
    exact = bound(small, digits, ids).report()
    runs = [bound(small, digits, ids, steps_per_image=4, seed=seed).report() for seed in range(8)]
    totals = np.array([run["total_bpd"] for run in runs])
    error = totals.std(ddof=1) / math.sqrt(len(totals))
    assert abs(totals.mean() - exact["total_bpd"]) < 5 * error < 0.15 * exact["total_bpd"]
    assert runs[0]["is_estimate"] and runs[0]["evaluations_per_image"] == 4 and "rate_bpd" not in runs[0]
    assert exact["evaluations_per_image"] == 20
    for steps in (1, 21):
        with pytest.raises(ValueError, match=f"steps_per_image={steps}: expected 2 to 20"):
            bound(small, digits, range(2), steps_per_image=steps)


def test_script_writes_results(trained, tmp_path):
    main = load_script("evaluate").main
    common = ["--model", str(trained), "--dataset", "digits", "--num_images", "2", "--output", str(tmp_path / "r.json")]
    main([*common, "--metrics", "nll"])
    results = json.loads((tmp_path / "r.json").read_text())
    nll = results["nll"]
    assert nll["total_bpd"] == pytest.approx(nll["prior_bpd"] + nll["vlb_bpd"] + nll["decoder_bpd"])
    assert nll["num_images"] == 2 and len(nll["terms_bpd"]) == 1000 and nll["made_by"]["request"]["levels"] == 17
    for options, message in [
        (["--output", str(tmp_path)], "is a folder; expected a file"),
        (["--metrics", "fvd"], "metrics.*fvd.*: .*any of fd, kid, is, pr, nll, separated by commas"),
        (["--num_images", "1000"], "num_images.1000.*: .*at most the 899 images in split 'test' of 'digits'"),
        (["--split", "validation"], "no split 'validation'"),
        (["--model", "no/such/model"], "model 'no/such/model' cannot be loaded"),
    ]:
        with pytest.raises(ValueError, match=message):
            main([*common, *options])
