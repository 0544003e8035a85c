"""Image editing: inpainting and inversion compared with closed forms on Gaussian data; arguments and errors."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from PIL import Image

from hf_ddpm import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from hf_ddpm.images import read_masks, to_unit
from hf_ddpm.pipelines.editing import resampled
from tests.conftest import TINY_UNET

# Data N(0, COVARIANCE) of 2x2 pixels, within [-1, 1]; neighbors in reading order have a correlation of 0.9.
POSITIONS = np.arange(4)
COVARIANCE = 0.2**2 * 0.9 ** np.abs(POSITIONS[:, None] - POSITIONS)
# The noise-to-signal ratio grows by the same factor in each step, from a tenth of the data's standard deviation.
T = 60
BARS = 1 / (1 + np.geomspace(0.02, 40, T) ** 2)
BETAS = 1 - BARS / np.append(1, BARS[:-1])
# The first and the last pixel are known.
KNOWN, X_0 = np.array([True, False, False, True]), np.array([0.3, 0, 0, -0.1])
BOTH = np.ix_(~KNOWN, ~KNOWN)
N = 20_000


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gain(t):
    """Return G in E[x_0 | x_t] = G x_t."""
    return np.sqrt(BARS[t]) * COVARIANCE @ np.linalg.inv(BARS[t] * COVARIANCE + (1 - BARS[t]) * np.eye(4))


@pytest.fixture
def gaussian_pipeline():
    """The optimal network for these data: E[eps | x_t] = (x_t - sqrt(ab) E[x_0 | x_t]) / sqrt(1 - ab)."""
    gains = [torch.tensor(gain(t), dtype=torch.float32) for t in range(T)]

    class OptimalUNet(UNet2DModel):
        def forward(self, sample, timestep, class_labels=None, return_dict=True):
            t = int(timestep)
            x_start = (sample.flatten(1) @ gains[t].T).view_as(sample)
            return UNet2DOutput((sample - float(np.sqrt(BARS[t])) * x_start) / float(np.sqrt(1 - BARS[t])))

    options = {"num_train_timesteps": T, "trained_betas": BETAS.tolist(), "clip_sample": False}
    pipe = DDPMPipeline(OptimalUNet(**{**TINY_UNET, "sample_size": 2}), DDPMScheduler(**options))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def conditional():
    """Return mean and covariance of the unknown pixels given the known ones."""
    regression = COVARIANCE[np.ix_(~KNOWN, KNOWN)] @ np.linalg.inv(COVARIANCE[np.ix_(KNOWN, KNOWN)])
    return regression @ X_0[KNOWN], COVARIANCE[BOTH] - regression @ COVARIANCE[np.ix_(KNOWN, ~KNOWN)]


def repainted(jump_length, jump_n_sample, steps=tuple(range(T))):
    """Return mean and covariance of the unknown pixels by Algorithm 1 of RePaint, whose steps are linear here."""
    mean, cov, bars = np.zeros(4), np.eye(4), BARS[list(steps)]
    jumps = {s: jump_n_sample - 1 for s in range(0, len(bars) - jump_length, jump_length)}
    i = len(bars) - 1
    while i >= 0:
        before = bars[i - 1] if i else 1.0
        beta, spread = 1 - bars[i] / before, 1 - bars[i]
        # Eq. 7 of DDPM at E[x_0 | x_t].
        step = np.sqrt(before) * beta / spread * gain(steps[i]) + np.sqrt(1 - beta) * (1 - before) / spread * np.eye(4)
        mean, cov = step @ mean, step @ cov @ step.T + beta * (1 - before) / spread * np.eye(4)
        mean = np.where(KNOWN, np.sqrt(before) * X_0, mean)
        cov = np.where(KNOWN[:, None] | KNOWN, (1 - before) * np.diag(KNOWN.astype(float)), cov)
        i -= 1
        if jumps.get(i, 0):
            jumps[i] -= 1
            ratio = bars[i + jump_length] / bars[i]
            mean, cov = np.sqrt(ratio) * mean, ratio * cov + (1 - ratio) * np.eye(4)
            i += jump_length
    return mean[~KNOWN], cov[BOTH]


def filled_moments(pipe, jump_length, jump_n_sample, num_inference_steps=T):
    """Return mean and covariance of the filled pixels over N results of `inpaint`."""
    images = torch.tensor(X_0, dtype=torch.float32).view(1, 1, 2, 2).expand(N, -1, -1, -1)
    mask = torch.tensor(~KNOWN).view(2, 2)
    options = {"jump_length": jump_length, "jump_n_sample": jump_n_sample, "output_type": "pt"}
    filled = pipe.inpaint(images, mask, seeded(), num_inference_steps, **options).images
    results = (2 * filled.double() - 1).flatten(1).numpy()
    assert np.abs(results[:, KNOWN] - X_0[KNOWN]).max() < 1e-6
    return results.mean(0)[~KNOWN], np.cov(results[:, ~KNOWN], rowvar=False)


def assert_moments(actual, expected, mean_bias=0.0, cov_bias=0.0):
    """Compare within five standard errors plus a bias: of means in standard deviations, of covariances relative."""
    (mean, cov), (true_mean, true_cov) = actual, expected
    variances = np.diag(true_cov)
    errors = np.sqrt((np.outer(variances, variances) + true_cov**2) / N)  # standard errors of the covariances
    assert np.all(np.abs(mean - true_mean) <= 5 * np.sqrt(variances / N) + mean_bias * np.sqrt(variances))
    assert np.all(np.abs(cov - true_cov) <= 5 * errors + cov_bias * true_cov)


@pytest.mark.parametrize(("jump_length", "jump_n_sample"), [(1, 1), (1, 3), (4, 3), (2, 20)])
def test_filled_pixels_have_moments_of_algorithm_1(gaussian_pipeline, jump_length, jump_n_sample):
    moments = filled_moments(gaussian_pipeline, jump_length, jump_n_sample)
    assert_moments(moments, repainted(jump_length, jump_n_sample))


@pytest.mark.parametrize(("jump_length", "jump_n_sample"), [(1, 1), (1, 3), (2, 5)])
def test_filled_pixels_in_fewer_steps_have_moments_of_algorithm_1(gaussian_pipeline, jump_length, jump_n_sample):
    # Each of the 10 steps changes the noise-to-signal ratio by 2.2, so a wrong timestep would change the moments.
    gaussian_pipeline.scheduler = DDPMScheduler.from_config(
        gaussian_pipeline.scheduler.config, timestep_spacing="trailing"
    )
    moments = filled_moments(gaussian_pipeline, jump_length, jump_n_sample, 10)
    assert_moments(moments, repainted(jump_length, jump_n_sample, range(5, T, 6)))


def test_filled_pixels_follow_data_given_known_pixels(gaussian_pipeline):
    # The next test shows that the bias after 20 passes is below 0.08 standard deviations and 12 percent.
    assert_moments(filled_moments(gaussian_pipeline, 2, 20), conditional(), mean_bias=0.08, cov_bias=0.12)


def test_bias_of_algorithm_1_shrinks_with_more_passes():
    mean, cov = conditional()
    deviations = np.sqrt(np.diag(cov))
    mean_bias, cov_bias = [], []
    for jump_n_sample in (1, 5, 20, 80):
        filled_mean, filled_cov = repainted(2, jump_n_sample)
        mean_bias.append(np.abs((filled_mean - mean) / deviations).max())
        cov_bias.append(np.abs(filled_cov / cov - 1).max())
    assert mean_bias[0] > 0.6 and cov_bias[0] > 1  # without jumps
    assert 0.13 < mean_bias[1] < 0.17 and 0.06 < mean_bias[2] < 0.08 and mean_bias[3] < 0.06
    # The remaining bias comes from the finite length of the reverse steps with `fixed_small`.
    assert max(cov_bias[1:]) < 0.15 and max(cov_bias[2:]) < 0.12


def published(num_steps, jump_length, jump_n_sample):
    """Return the visited times as in the pseudo-code of the paper's appendix."""
    jumps = {j: jump_n_sample - 1 for j in range(0, num_steps - jump_length, jump_length)}
    t, times = num_steps, []
    while t >= 1:
        t = t - 1
        times.append(t)
        if jumps.get(t, 0) > 0:
            jumps[t] = jumps[t] - 1
            for _ in range(jump_length):
                t = t + 1
                times.append(t)
    return [*times, -1]


@pytest.mark.parametrize("arguments", [(250, 10, 10), (60, 1, 3), (61, 7, 2), (10, 9, 4), (10, 10, 4), (1, 1, 9)])
def test_resampled_states_are_those_of_paper(arguments):
    times = published(*arguments)
    # The network is evaluated if the next time is smaller.
    assert resampled(*arguments) == [t for t, after in zip(times[:-1], times[1:], strict=True) if after < t]


@pytest.fixture
def short_pipeline(tiny_unet):
    pipe = DDPMPipeline(tiny_unet, DDPMScheduler(num_train_timesteps=12, beta_start=5e-3, beta_end=0.7))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def images():
    return torch.rand(4, 1, 8, 8, generator=seeded(9)) * 2 - 1


@pytest.fixture
def masks():
    """Masks of all pixels, none, one half, and one in four."""
    masks = torch.zeros(4, 1, 8, 8, dtype=torch.bool)
    masks[0], masks[2, :, 4:], masks[3, :, ::2, ::2] = True, True, True
    return masks


FEW = {"jump_length": 3, "jump_n_sample": 2, "output_type": "pt"}


def test_known_pixels_do_not_change(short_pipeline, images, masks):
    filled = short_pipeline.inpaint(images, masks, seeded(), **FEW).images
    assert torch.equal(filled[~masks], to_unit(images)[~masks])
    assert (filled - to_unit(images))[masks].abs().min() > 0
    pixels = (torch.rand(4, 8, 8, generator=seeded(1)) * 255).byte()
    pictures = [Image.fromarray(image.numpy()) for image in pixels]
    white = [Image.fromarray(mask[0].numpy()) for mask in masks]
    filled = short_pipeline.inpaint(pictures, white, seeded(), jump_length=3, jump_n_sample=2).images
    output = torch.stack([torch.tensor(np.asarray(picture)) for picture in filled])
    assert torch.equal(output[~masks[:, 0]], pixels[~masks[:, 0]])
    assert (output != pixels)[masks[:, 0]].float().mean() > 0.9


def test_images_with_their_own_generators_do_not_depend_on_batch(short_pipeline, images, masks):
    batch = short_pipeline.inpaint(images, masks, [seeded(i) for i in range(4)], **FEW).images
    for i in range(4):
        single = short_pipeline.inpaint(images[i], masks[i], [seeded(i)], **FEW, return_dict=False)[0]
        torch.testing.assert_close(single[0], batch[i], rtol=0, atol=1e-5)
    order = [2, 0, 3]
    others = short_pipeline.inpaint(images[order], masks[order], [seeded(i) for i in order], **FEW).images
    torch.testing.assert_close(others, batch[order], rtol=0, atol=1e-5)


def test_full_masks_sample_and_empty_masks_evaluate_nothing(short_pipeline, images):
    timesteps = []
    short_pipeline.unet.register_forward_pre_hook(lambda module, args: timesteps.append(int(args[1])))
    sampled = short_pipeline(4, seeded(), 6, output_type="pt").images
    filled = short_pipeline.inpaint(images, torch.ones(8, 8), seeded(), 6, **FEW).images
    assert torch.equal(filled, sampled) and len(timesteps) == 12
    unchanged = short_pipeline.inpaint(images, torch.zeros(8, 8), seeded(), **FEW).images
    assert torch.equal(unchanged, to_unit(images)) and len(timesteps) == 12


def test_steps_and_jumps_use_timesteps_of_scheduler(short_pipeline, images, masks):
    timesteps = []
    short_pipeline.unet.register_forward_pre_hook(lambda module, args: timesteps.append(int(args[1])))
    short_pipeline.inpaint(images[2], masks[2], seeded(), 4, jump_length=1, jump_n_sample=2)
    short_pipeline.scheduler.set_timesteps(4)
    times = short_pipeline.scheduler.timesteps.tolist()[::-1]
    assert timesteps == [times[i] for i in (3, 3, 2, 2, 1, 1, 0)]
    assert short_pipeline.num_timesteps == 7


def test_callbacks_get_known_pixels_and_may_replace_latents(short_pipeline, images, masks):
    calls = []

    def record(pipe, i, t, tensors):
        calls.append((i, int(t), tensors))
        return {"latents": torch.full_like(tensors["latents"], 0.5)}

    filled = short_pipeline.inpaint(
        images[2], masks[2], seeded(), **FEW,
        callback_on_step_end=record, callback_on_step_end_tensor_inputs=["latents", "model_output"],
    ).images  # fmt: skip
    assert [i for i, _, _ in calls] == list(range(short_pipeline.num_timesteps))
    assert set(calls[0][2]) == {"latents", "model_output"}
    assert torch.equal(calls[-1][2]["latents"][0][~masks[2]], images[2][~masks[2]])
    assert torch.equal(filled[0], torch.where(masks[2], 0.75, to_unit(images[2])))


def test_masks_may_be_pil_images_arrays_or_tensors(masks):
    array = masks.numpy()
    gray = (masks * 128).byte()  # the first byte above one half
    pictures = [Image.fromarray(mask[0]) for mask in array]
    variants = [
        masks, masks.float(), masks.long(), masks[:, 0], gray, gray.numpy(), array, array.astype(np.uint16) * 200,
        array.transpose(0, 2, 3, 1), array * 0.5, pictures, [picture.convert("RGB") for picture in pictures],
        [picture.convert("P") for picture in pictures], [picture.convert("RGBA") for picture in pictures],
        [masks[0], array[1], pictures[2], masks[3, 0]],
    ]  # fmt: skip
    for variant in variants:
        assert torch.equal(read_masks(variant, 4, (8, 8)), masks)
    assert not read_masks(gray.clamp(max=127), 4, (8, 8)).any() and not read_masks(masks * 0.499, 4, (8, 8)).any()
    for one in (masks[2], masks[2, 0], masks[2:3], pictures[2], [pictures[2]]):
        assert torch.equal(read_masks(one, 4, (8, 8)), masks[2].expand(4, 1, 8, 8))


ONE, MASK = torch.zeros(1, 8, 8), torch.ones(8, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe: pipe.inpaint(ONE, torch.ones(8, 9)), r"masks of shape \(8, 9\): expected \(N, 1, H, W\)"),
        (lambda pipe: pipe.inpaint(ONE, torch.ones(1, 3, 8, 8)), r"masks of shape \(1, 3, 8, 8\): expected"),
        (lambda pipe: pipe.inpaint(ONE, Image.new("L", (9, 8))), r"masks of shape \(8, 9\): expected"),
        (lambda pipe: pipe.inpaint(ONE, Image.new("RGBA", (8, 8))), "mask has transparent pixels: expected"),
        (lambda pipe: pipe.inpaint(ONE, Image.new("F", (8, 8))), "mask of mode F: expected"),
        (lambda pipe: pipe.inpaint(ONE, MASK * float("nan")), r"masks of float32 with values outside \[0, 1\]"),
        (lambda pipe: pipe.inpaint(ONE, -MASK), r"masks of float32 with values outside \[0, 1\]: expected"),
        (lambda pipe: pipe.inpaint(ONE, MASK.long() * 256), r"masks of int64 with values outside \[0, 255\]"),
        (lambda pipe: pipe.inpaint(ONE, np.full((8, 8), "a")), "masks of type ndarray of <U1: expected"),
        (lambda pipe: pipe.inpaint(ONE, "mask.png"), "masks of type str: expected PIL images, or arrays"),
        (lambda pipe: pipe.inpaint(ONE, None), "masks of type NoneType: expected"),
        (lambda pipe: pipe.inpaint(ONE, []), "0 masks for 1 images: expected one mask for all, or one per"),
        (lambda pipe: pipe.inpaint(ONE, torch.ones(0, 1, 8, 8)), "0 masks for 1 images: expected"),
        (lambda pipe: pipe.inpaint([ONE] * 3, [MASK] * 2), "2 masks for 3 images: expected"),
        (lambda pipe: pipe.inpaint([], MASK), "images are empty: expected at least one"),
        (lambda pipe: pipe.inpaint(ONE, MASK, [seeded()] * 2), "generator of 2 generators: expected .* a list of 1,"),
        (lambda pipe: pipe.inpaint(ONE, MASK, jump_length=0), "jump_length=0: expected a whole number of at least 1"),
        (lambda pipe: pipe.inpaint(ONE, MASK, jump_n_sample=1.5), "jump_n_sample=1.5: expected a whole number of at"),
        (lambda pipe: pipe.inpaint(ONE, MASK, None, 0), "num_inference_steps=0: expected 1 to 12"),
        (lambda pipe: pipe.inpaint(ONE, MASK, None, -1), "num_inference_steps=-1: expected 1 to 12"),
        (lambda pipe: pipe.inpaint(ONE, MASK, output_type="jpg"), "output_type='jpg': expected one of pil, np"),
        (
            lambda pipe: pipe.inpaint(ONE, MASK, class_labels=[1]),
            "class_labels: the model has no classes; expected none",
        ),
        (lambda pipe: pipe.vary(ONE, 0), "strength=0: expected a number above 0 and at most 1"),
        (lambda pipe: pipe.vary(ONE, float("nan")), "strength=nan: expected a number above 0 and at most 1"),
        (lambda pipe: pipe.invert(ONE, num_iterations=0), "num_iterations=0: expected a whole number of at least 1"),
        (lambda pipe: pipe.invert(ONE, num_iterations=2.5), "num_iterations=2.5: expected a whole number of at least"),
        (lambda pipe: pipe.invert(ONE, num_iterations=True), "num_iterations=True: expected a whole number of at le"),
        (lambda pipe: pipe.invert(ONE, t=12), "t=12: expected a whole number from 0 to 11"),
        (lambda pipe: pipe.invert(ONE, 5, t=3), "num_inference_steps=5: expected 1 to 4 when starting at t=3"),
    ],
)
def test_invalid_arguments_are_rejected_in_one_line(short_pipeline, call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(short_pipeline)
    assert "\n" not in str(caught.value)


def test_schedulers_of_diffusers_are_rejected(short_pipeline):
    for name in ("DDPMScheduler", "DDIMScheduler"):
        short_pipeline.scheduler = getattr(diffusers, name).from_config(short_pipeline.scheduler.config)
        for call in (lambda: short_pipeline.inpaint(ONE, MASK), lambda: short_pipeline.invert(ONE)):
            with pytest.raises(ValueError, match=f"scheduler=diffusers.{name}: expected a DDPMScheduler of hf_ddpm; s"):
                call()


def test_inpainting_supports_networks_of_diffusers_and_classes(images, masks):
    torch.manual_seed(0)
    pipe = DDPMPipeline(
        diffusers.UNet2DModel(**TINY_UNET, num_class_embeds=3),
        DDPMScheduler(num_train_timesteps=12, beta_start=5e-3, beta_end=0.7),
        id2label={"0": "a", "1": "b"},
    )
    pipe.set_progress_bar_config(disable=True)
    fills = {
        (label, scale): pipe.inpaint(images, masks, seeded(), class_labels=[label] * 4, guidance_scale=scale, **FEW)
        for label in ("a", "b")
        for scale in (1.0, 3.0)
    }
    results = torch.stack([fill.images for fill in fills.values()])
    assert torch.equal(results[:, ~masks], to_unit(images)[~masks].expand(4, -1))
    assert all(not torch.equal(results[i], results[j]) for i in range(4) for j in range(i))
    batch = pipe.inpaint(images, masks, [seeded(i) for i in range(4)], class_labels=["b", "a", "a", "b"], **FEW).images
    single = pipe.inpaint(images[3], masks[3], [seeded(3)], class_labels=["b"], **FEW).images
    torch.testing.assert_close(batch[3:], single, rtol=0, atol=1e-5)


def test_variations_are_reconstructions(short_pipeline, images):
    for strength, t in ((0.01, 0), (0.25, 2), (0.5, 5), (1, 11)):
        varied = short_pipeline.vary(images, strength, seeded(), "pt")
        assert torch.equal(varied, short_pipeline.reconstruct(images, t, seeded(), "pt"))


def test_inversion_follows_flow_of_gaussian_data(gaussian_pipeline):
    # In each eigenvector direction of the covariance, a DDIM step multiplies by a factor; inversion divides by all.
    values, directions = np.linalg.eigh(COVARIANCE)
    scales = np.ones(4)
    for t in range(T):
        before, gains = BARS[t - 1] if t else 1.0, np.sqrt(BARS[t]) * values / (BARS[t] * values + 1 - BARS[t])
        scales /= np.sqrt(before) * gains + np.sqrt((1 - before) / (1 - BARS[t])) * (1 - np.sqrt(BARS[t]) * gains)
    # With many steps this approaches the ODE, which keeps x_t constant in units of its standard deviation.
    np.testing.assert_allclose(scales, np.sqrt((BARS[-1] * values + 1 - BARS[-1]) / values), rtol=0.12)
    x_0 = seeded_data(5)
    expected = x_0.flatten(1).numpy() @ (directions * scales) @ directions.T

    latents = gaussian_pipeline.invert(x_0, num_iterations=30)
    np.testing.assert_allclose(latents.flatten(1).numpy(), expected, atol=1e-4)
    assert type(gaussian_pipeline.scheduler) is DDPMScheduler  # not replaced
    gaussian_pipeline.scheduler = DDIMScheduler.from_config(gaussian_pipeline.scheduler.config)
    errors = []
    for num_iterations in (1, 3, 30):
        latents = gaussian_pipeline.invert(x_0, num_iterations=num_iterations)
        decoded = gaussian_pipeline(5, latents=latents, output_type="pt").images
        errors.append((2 * decoded - 1 - x_0).abs().max().item())
    assert errors[0] > 0.02 > 0.005 > errors[1] and errors[2] < 1e-5


def seeded_data(count):
    noise = torch.randn(count, 4, generator=seeded())
    return (noise @ torch.tensor(np.linalg.cholesky(COVARIANCE).T, dtype=torch.float32)).view(count, 1, 2, 2)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_decoding_inverted_images_recovers_them(images, spacing):
    bars = DDPMScheduler().diffusion.alphas_cumprod

    class OptimalUNet(UNet2DModel):  # for independent pixels N(0.1, 0.3^2)
        def forward(self, sample, timestep, class_labels=None, return_dict=True):
            bar = float(bars[int(timestep)])
            return UNet2DOutput((1 - bar) ** 0.5 * (sample - bar**0.5 * 0.1) / (bar * 0.3**2 + 1 - bar))

    pipe = DDPMPipeline(OptimalUNet(**TINY_UNET), DDIMScheduler(timestep_spacing=spacing))
    pipe.set_progress_bar_config(disable=True)
    latents = pipe.invert(images, num_inference_steps=100)
    assert torch.equal(latents, pipe.invert(images, num_inference_steps=100))
    decoded = pipe(4, latents=latents, num_inference_steps=100, output_type="pt").images
    torch.testing.assert_close(decoded, to_unit(images), rtol=0, atol=1e-2)
    latents = pipe.invert(images, num_inference_steps=50, t=700)
    decoded = pipe.decode(latents, 700, num_inference_steps=50, output_type="pt")
    torch.testing.assert_close(decoded, to_unit(images), rtol=0, atol=1e-2)
