import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from PIL import Image

from hf_ddpm import DDPMPipeline, DDPMScheduler, UNet2DModel
from tests.conftest import TINY_UNET

T = 50
STEPS = {"num_train_timesteps": T, "beta_start": 2e-3, "beta_end": 0.2}
BETAS = np.linspace(2e-3, 0.2, T)
BARS = np.cumprod(1 - BETAS)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# Data N(0, 0.2^2 I), within the range of images.
DEVIATION = 0.2
# E[x_0 | x_t] = GAINS[t] x_t.
GAINS = np.sqrt(BARS) * DEVIATION**2 / (BARS * DEVIATION**2 + 1 - BARS)


@pytest.fixture
def optimal_pipeline():
    """The optimal network for these data: E[eps | x_t] = (x_t - sqrt(ab) E[x_0 | x_t]) / sqrt(1 - ab)."""

    class OptimalUNet(UNet2DModel):
        def forward(self, sample, timestep, class_labels=None, return_dict=True):
            t = int(timestep)
            return UNet2DOutput(sample * float((1 - np.sqrt(BARS[t]) * GAINS[t]) / np.sqrt(1 - BARS[t])))

    scheduler = DDPMScheduler(**STEPS, variance_type="fixed_large", clip_sample=False)
    pipe = DDPMPipeline(OptimalUNet(**TINY_UNET), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def decoded_moments(t):
    """Return m and v in x_0 ~ N(m x_t, v), from the steps x_{s-1} = c1 E[x_0 | x_s] + c2 x_s + sqrt(beta_s) z."""
    gain, variance = 1.0, 0.0
    for s in range(t, 0, -1):
        c1 = np.sqrt(BARS[s - 1]) * BETAS[s] / (1 - BARS[s])
        c2 = np.sqrt(1 - BETAS[s]) * (1 - BARS[s - 1]) / (1 - BARS[s])
        step = c1 * GAINS[s] + c2
        gain, variance = step * gain, step**2 * variance + BETAS[s]
    return GAINS[0] * gain, GAINS[0] ** 2 * variance


@pytest.fixture
def short_pipeline(tiny_unet):
    pipe = DDPMPipeline(tiny_unet, DDPMScheduler(**STEPS, variance_type="fixed_large"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def images():
    return torch.rand(16, 1, 8, 8, generator=seeded(9)) * 2 - 1


def test_reconstruction_error_grows_with_timestep(tiny_pipeline, images):
    # At t = 0 only the noise of the first step is removed; at the last timestep nothing of the image is left.
    errors = [
        (2 * tiny_pipeline.reconstruct(images, t, seeded(), "pt") - 1 - images).square().mean().item()
        for t in (0, 300, 999)
    ]
    assert errors[0] < 1e-3 < errors[1] < errors[2]
    with pytest.raises(ValueError, match="t=1000: expected a whole number from 0 to 999"):
        tiny_pipeline.reconstruct(images, 1000)


@pytest.mark.parametrize(
    ("t", "count", "expected"),
    # Divide the t + 1 timesteps into `count` parts whose lengths differ by at most one; take the last one of each part.
    [(9, 5, [9, 7, 5, 3, 1]), (9, 3, [9, 5, 2]), (9, 1, [9]), (0, 1, [0]), (4, None, [4, 3, 2, 1, 0])],
)
def test_decode_starts_at_t(short_pipeline, t, count, expected):
    timesteps = []
    short_pipeline.unet.register_forward_pre_hook(lambda module, args: timesteps.append(int(args[1])))
    latents = torch.randn(2, 1, 8, 8, generator=seeded())
    decoded = short_pipeline.decode(latents, t, seeded(1), "pt", num_inference_steps=count)
    assert timesteps == expected
    sampled = short_pipeline(2, seeded(1), latents=latents, timesteps=expected, output_type="pt").images
    assert torch.equal(decoded, sampled)


@pytest.mark.parametrize("count", [0, -1, 11])
def test_decode_takes_at_most_all_steps_up_to_t(short_pipeline, count):
    with pytest.raises(ValueError, match=f"num_inference_steps={count}: expected 1 to 10 when starting at t=9"):
        short_pipeline.decode(torch.zeros(1, 1, 8, 8), 9, num_inference_steps=count)


def test_encodings_have_moments_of_forward_process(short_pipeline):
    x_t = short_pipeline.encode(torch.full((500, 1, 8, 8), 0.5), 20, seeded())
    assert x_t.mean().item() == pytest.approx(0.5 * np.sqrt(BARS[20]), abs=0.02)
    assert x_t.var().item() == pytest.approx(1 - BARS[20], rel=0.03)


@pytest.mark.parametrize("t", [0, 5, 20, T - 1])
def test_images_of_latent_have_exact_distribution(optimal_pipeline, t):
    latents = torch.randn(2, 1, 8, 8, generator=seeded(1)) * DEVIATION
    images = optimal_pipeline.share_latent(t, 400, seeded(), "pt", latents)
    gain, variance = decoded_moments(t)
    x_0 = (2 * images - 1).view(2, 400, 1, 8, 8)
    torch.testing.assert_close(x_0.mean(1), gain * latents, rtol=0, atol=5 * np.sqrt(variance / 400) + 1e-5)
    assert x_0.var(1).mean().item() == pytest.approx(variance, rel=0.05, abs=1e-9)


def test_decoded_moments_have_expected_limits():
    # x_T contains nothing of the image, so decoded images have about the variance of the data (steps are coarse); at
    # t = 0 the image is determined.
    variances = [decoded_moments(t)[1] for t in range(T)]
    assert np.all(np.diff(variances) > 0)
    assert variances[0] == 0 and 0.5 * DEVIATION**2 < variances[-1] < 1.5 * DEVIATION**2


def test_trace_equals_latents_of_call(short_pipeline):
    results = {}
    expected = short_pipeline(
        2, seeded(), T, output_type="pt",
        callback_on_step_end=lambda pipe, i, t, tensors: results.update({int(t): tensors["latents"]}),
    ).images  # fmt: skip
    latents, images = short_pipeline.trace([T - 1, 13, 0], 2, seeded(), "pt")
    assert list(latents) == [T - 1, 13, 0] and torch.equal(images, expected)
    assert torch.equal(latents[T - 1], torch.randn(2, 1, 8, 8, generator=seeded()))
    assert torch.equal(latents[13], results[14]) and torch.equal(latents[0], results[1])


def test_share_latent_draws_latent_by_trace(short_pipeline):
    source = seeded()
    latent = short_pipeline.trace([20], 1, source).latents[20]
    expected = short_pipeline.decode(latent.expand(3, -1, -1, -1), 20, source, "pt")
    images = short_pipeline.share_latent(20, 3, seeded(), "pt")
    assert torch.equal(images, expected) and not torch.equal(images[0], images[1])


def test_interpolation_decodes_mixed_latents(short_pipeline, images):
    first, second = images[0], images[1]
    between = short_pipeline.interpolate(first, second, 30, [0, 0.3, 1], seeded(), "pt")
    source = seeded()
    latents = short_pipeline.encode([first, second], 30, source)
    state = source.get_state()
    for latent, image in [
        (latents[0], between[0]),
        (0.7 * latents[0] + 0.3 * latents[1], between[1]),
        (latents[1], between[2]),
    ]:
        expected = short_pipeline.decode(latent[None], 30, source.set_state(state), "pt")
        torch.testing.assert_close(image, expected[0], rtol=0, atol=1e-5)
    assert (between[0] - between[2]).abs().max() > 0.1


def test_all_weights_use_same_noise(short_pipeline, images):
    first, second = short_pipeline.interpolate(images[0], images[1], 40, [0.5, 0.5], seeded(), "pt")
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


def test_results_depend_only_on_generator(short_pipeline, images):
    def methods():
        yield lambda source: short_pipeline.encode(images, 20, source)
        yield lambda source: short_pipeline.reconstruct(images, 20, source, "pt")
        yield lambda source: short_pipeline.interpolate(images[0], images[1], 20, [0.2, 0.8], source, "pt")
        yield lambda source: short_pipeline.share_latent(20, 2, source, "pt")
        yield lambda source: short_pipeline.trace([20], 2, source, "pt").latents[20]
        yield lambda source: torch.stack(short_pipeline.progressive(1, source, T, 3, "pt").images)

    for run in methods():
        assert torch.equal(run(seeded(3)), run(seeded(3))) and not torch.equal(run(seeded(3)), run(seeded(4)))
        source = seeded(3)
        assert not torch.equal(run(source), run(source))  # the state of the generator changes
        torch.manual_seed(5)
        unseeded = run(None)
        assert not torch.equal(unseeded, run(None))
        torch.manual_seed(5)
        assert torch.equal(unseeded, run(None))


def test_first_frame_is_estimate_from_noise_and_last_frame_image(optimal_pipeline):
    frames, timesteps = optimal_pipeline.progressive(3, seeded(), T, 5, "pt")
    assert timesteps == [49, 37, 25, 12, 0]
    x_T = torch.randn(3, 1, 8, 8, generator=seeded())
    torch.testing.assert_close(2 * frames[0] - 1, float(GAINS[-1]) * x_T)
    assert torch.equal(frames[-1], optimal_pipeline(3, seeded(), T, "pt").images)


def test_frames_are_chosen_by_number_or_timestep(short_pipeline):
    def timesteps(frames, steps=10, **options):
        return short_pipeline.progressive(1, seeded(), steps, frames, **options).timesteps

    assert timesteps(None) == timesteps(10) == timesteps(99) == [49, 44, 39, 34, 29, 24, 19, 14, 9, 4]
    assert timesteps(1) == [4] and timesteps(2) == [49, 4]
    assert timesteps(2, latents=torch.zeros(1, 1, 8, 8), timesteps=[30, 20, 10]) == [30, 10]
    assert isinstance(short_pipeline.progressive(2, seeded(), 3, 2).images[1][1], Image.Image)
    trailing = {"timestep_spacing": "trailing"}
    short_pipeline.scheduler = diffusers.DDIMScheduler.from_config(short_pipeline.scheduler.config, **trailing)
    assert timesteps(2) == [49, 4]
    config = short_pipeline.scheduler.config
    short_pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(config, **trailing)
    message = "scheduler DPMSolverMultistepScheduler: returns no estimate of x_0, which progressive needs; use a DDPM"
    with pytest.raises(ValueError, match=message):
        timesteps(2)


def test_images_may_be_pil_images_arrays_or_tensors(images):
    unet = UNet2DModel(**{**TINY_UNET, "in_channels": 3, "out_channels": 3, "sample_size": (8, 12)})
    pipe = DDPMPipeline(unet, DDPMScheduler())
    pixels = (torch.rand(2, 3, 8, 12, generator=seeded()) * 255).round()
    array = pixels.permute(0, 2, 3, 1).numpy()
    signed = pixels / 127.5 - 1
    variants = [
        signed,
        [signed[0], signed[1]],
        array.astype(np.uint8),
        array / 255,
        [Image.fromarray(picture.astype(np.uint8)) for picture in array],
        [array[0].astype(np.uint8), signed[1]],
    ]
    expected = DDPMScheduler().add_noise(signed, torch.randn(signed.shape, generator=seeded()), torch.tensor([100]))
    for variant in variants:
        torch.testing.assert_close(pipe.encode(variant, 100, seeded()), expected)


def test_network_gets_classes(images):
    calls = []

    class RecordingUNet(UNet2DModel):
        def forward(self, sample, timestep, class_labels=None, return_dict=True):
            calls.append(class_labels.tolist())
            return UNet2DOutput(torch.zeros_like(sample))

    pipe = DDPMPipeline(RecordingUNet(**TINY_UNET, num_class_embeds=3), DDPMScheduler(num_train_timesteps=3))
    pipe.set_progress_bar_config(disable=True)
    latents = pipe.trace([1], 2, class_labels=[2, 1]).latents[1]
    pipe.share_latent(1, 2, latents=latents, class_labels=torch.tensor([2, 1]))
    pipe.share_latent(1, 2, class_labels=[0])
    assert calls == [[2, 1]] * 3 + [[2, 2, 1, 1]] * 2 + [[0]] * 3 + [[0, 0]] * 2
    calls.clear()
    pipe.interpolate(images[0], images[1], 1, [0, 1], class_labels=[1, 2])
    pipe.reconstruct(images[:2], 0, class_labels=[0, 1])
    pipe.progressive(1, None, 2, class_labels=[2])
    assert calls == [[1, 2]] * 2 + [[0, 1]] + [[2]] * 2


PICTURE, ONE = Image.new("L", (8, 8)), torch.zeros(1, 8, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe: pipe.encode(PICTURE, 50), "t=50: expected a whole number from 0 to 49"),
        (lambda pipe: pipe.encode(PICTURE, -1), "t=-1: expected a whole number from 0 to 49"),
        (lambda pipe: pipe.encode(PICTURE, 0.5), "t=0.5: expected a whole number from 0 to 49"),
        (lambda pipe: pipe.decode(ONE[None], 50), "t=50: expected a whole number from 0 to 49"),
        (lambda pipe: pipe.share_latent(50), "t=50: expected a whole number from 0 to 49"),
        (lambda pipe: pipe.encode(Image.new("L", (9, 8)), 1), r"images of shape \(1, 8, 9\): expected \(C"),
        (lambda pipe: pipe.encode(Image.new("RGB", (8, 8)), 1), "PIL image of mode RGB: expected"),
        (lambda pipe: pipe.encode(torch.zeros(2, 3, 8, 8), 1), r"images of shape \(3, 8, 8\): expected"),
        (lambda pipe: pipe.encode(np.zeros((1, 8, 8), np.uint8), 1), r"images of shape \(8, 1, 8\): expected"),
        (lambda pipe: pipe.encode(np.zeros((8, 8)), 1), r"images of type ndarray of shape \(8, 8\): expected"),
        (lambda pipe: pipe.encode("a.png", 1), "images of type str: expected PIL images, arrays"),
        (lambda pipe: pipe.encode([], 1), "images are empty"),
        (lambda pipe: pipe.encode(torch.zeros(0, 1, 8, 8), 1), "images are empty"),
        (lambda pipe: pipe.encode(2 * ONE + 2, 1), r"float32 .*2 to 2: expected floats in \[-1, 1\]"),
        (lambda pipe: pipe.encode(ONE / 0, 1), r"tensor of float32 .*nan to nan: expected"),
        (lambda pipe: pipe.encode(ONE.byte(), 1), r"uint8 .*0 to 0: expected floats in \[-1, 1\]"),
        (lambda pipe: pipe.encode(np.full((8, 8, 1), -0.5), 1), r"float64 .*-0.5 to -0.5: expected floats"),
        (lambda pipe: pipe.encode([ONE, ONE], 1, [seeded()] * 3), "generator of 3 generators: expected .* list of 2,"),
        (lambda pipe: pipe.interpolate(ONE, [ONE, ONE], 1, [0]), "second of 2 images: expected one image"),
        (lambda pipe: pipe.interpolate(ONE, ONE, 1, []), r"weights=\[\]: expected at least one .* in \[0, 1\]"),
        (lambda pipe: pipe.interpolate(ONE, ONE, 1, [0, 1.5]), r"weights=\[0, 1.5\]: expected .* in \[0, 1\]"),
        (lambda pipe: pipe.interpolate(ONE, ONE, 1, [0], [seeded()]), "generator of 1 generators: expected one gener"),
        (lambda pipe: pipe.progressive(frames=0), "frames=0: expected at least 1, or None"),
        (lambda pipe: pipe.trace([3, 50]), "t=50: expected a whole number from 0 to 49"),
        (lambda pipe: pipe.trace([3], 0), "batch_size=0: expected at least 1"),
        (lambda pipe: pipe.trace([3], 2, [seeded()]), "generator of 1 generators: expected .* list of 2,"),
        (lambda pipe: pipe.share_latent(3, 0), "num_images=0: expected at least 1"),
        (lambda pipe: pipe.share_latent(3, output_type="jpg"), "output_type='jpg': expected one of pil, np, pt"),
    ],
)  # fmt: skip
def test_invalid_arguments_are_rejected_in_one_line(short_pipeline, call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(short_pipeline)
    assert "\n" not in str(caught.value)


def test_schedulers_of_diffusers_are_rejected(short_pipeline):
    short_pipeline.scheduler = diffusers.DDIMScheduler.from_config(short_pipeline.scheduler.config)
    for call in (lambda: short_pipeline.encode(ONE, 1), lambda: short_pipeline.share_latent(1)):
        with pytest.raises(ValueError, match="scheduler=diffusers.DDIMScheduler: expected a DDPMScheduler of hf_ddpm"):
            call()


@pytest.mark.parametrize("generator", [0, [0, 1], "cpu"])
def test_generators_of_other_types_are_rejected(tiny_pipeline, generator):
    with pytest.raises(ValueError, match=r"generator=.*: expected torch.Generator\(\).manual_seed\(0\), or a list"):
        tiny_pipeline(batch_size=2, generator=generator, num_inference_steps=2)
