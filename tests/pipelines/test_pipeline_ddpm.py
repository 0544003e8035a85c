import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from PIL import Image

import hf_ddpm.pipelines.pipeline_ddpm
from hf_ddpm import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from tests.conftest import TINY_UNET


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("steps", "tolerance"), [(50, 1e-5), pytest.param(1000, 5e-5, marks=pytest.mark.slow)])
def test_images_equal_those_of_diffusers(tiny_pipeline, tmp_path, steps, tolerance):
    # The float32 coefficients of diffusers cause an error of 2e-5 after 1000 steps of an untrained network, which does
    # not correct errors.
    tiny_pipeline.save_pretrained(tmp_path)
    stock = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    stock.set_progress_bar_config(disable=True)
    actual, expected = (p(2, seeded(), steps, output_type="np").images for p in (tiny_pipeline, stock))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def test_output_types_contain_same_image(tiny_pipeline):
    def sample(output_type):
        return tiny_pipeline(2, generator=seeded(), num_inference_steps=5, output_type=output_type).images

    pil, numpy, torch_ = sample("pil"), sample("np"), sample("pt")
    assert isinstance(pil[0], Image.Image) and pil[0].mode == "L" and pil[0].size == (8, 8)
    assert numpy.shape == (2, 8, 8, 1) and torch_.shape == (2, 1, 8, 8)
    np.testing.assert_array_equal(np.asarray(pil[1]), np.round(numpy[1, ..., 0] * 255))
    np.testing.assert_array_equal(numpy, torch_.permute(0, 2, 3, 1).numpy())
    assert 0 <= numpy.min() and numpy.max() <= 1
    np.testing.assert_array_equal(sample("numpy"), numpy)  # the name in diffusers
    frames = tiny_pipeline.progressive(2, seeded(), 5, output_type="numpy")
    np.testing.assert_array_equal(frames.images[-1], numpy)


def test_images_with_their_own_generators_do_not_depend_on_batch(tiny_pipeline):
    def sample(seeds):
        generators = [seeded(seed) for seed in seeds]
        return tiny_pipeline(len(seeds), generator=generators, num_inference_steps=5, output_type="pt").images

    batch, single = sample([1, 2, 3]), sample([2])
    torch.testing.assert_close(batch[1], single[0], rtol=0, atol=1e-5)
    assert not torch.equal(batch[0], batch[1])


def test_sampling_uses_eval_mode_and_restores_mode(tiny_pipeline):
    images = []
    for training in (False, True):
        tiny_pipeline.unet.train(training)
        images.append(tiny_pipeline(generator=seeded(), num_inference_steps=3, output_type="pt").images)
        assert tiny_pipeline.unet.training is training
    torch.testing.assert_close(*images, rtol=0, atol=0)


def test_rejected_call_restores_mode(tiny_pipeline):
    tiny_pipeline.unet.train()
    with pytest.raises(ValueError):
        tiny_pipeline(num_inference_steps=5000)
    assert tiny_pipeline.unet.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_networks_return_float32_arrays(tiny_pipeline, dtype):
    full = tiny_pipeline(generator=seeded(), num_inference_steps=5, output_type="np").images
    half = tiny_pipeline.to(dtype)(generator=seeded(), num_inference_steps=5, output_type="np").images
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, full, atol=0.05)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_numbers_of_channels_and_rectangular_images(channels, mode):
    options = {**TINY_UNET, "sample_size": (8, 12), "in_channels": channels, "out_channels": channels}
    pipe = DDPMPipeline(UNet2DModel(**options), DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    image = pipe(num_inference_steps=2).images[0]
    assert image.mode == mode and image.size == (12, 8)


def test_images_depend_on_classes():
    pipe = DDPMPipeline(UNet2DModel(**TINY_UNET, num_class_embeds=3), DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def sample(labels):
        labels = torch.tensor(labels)
        generators = [seeded(), seeded()]
        return pipe(2, generators, 3, output_type="pt", class_labels=labels).images

    same, different = sample([1, 1]), sample([1, 2])
    torch.testing.assert_close(same[0], same[1])
    assert not torch.equal(different[0], different[1])


def test_callback_gets_tensors_and_may_replace_latents(tiny_pipeline):
    calls = []

    def callback(pipe, i, t, tensors):
        calls.append((i, int(t), tensors["pred_original_sample"].abs().max().item()))
        return {"latents": torch.zeros_like(tensors["latents"])} if i == 3 else {}

    images = tiny_pipeline(
        num_inference_steps=4,
        output_type="pt",
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "pred_original_sample"],
    ).images
    assert [(i, t) for i, t, _ in calls] == [(0, 999), (1, 749), (2, 499), (3, 249)]
    assert all(largest <= 1 for _, _, largest in calls)  # x_0-hat is clipped
    assert bool((images == 0.5).all())


def test_sampling_from_latents_may_start_at_any_timestep(tiny_pipeline):
    calls = []

    def callback(pipe, i, t, tensors):
        calls.append((int(t), sorted(tensors)))

    tiny_pipeline(
        latents=torch.zeros(1, 1, 8, 8),
        timesteps=[300, 20, 0],
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["model_output", "latents"],
    )
    assert calls == [(t, ["latents", "model_output"]) for t in (300, 20, 0)]
    with pytest.raises(ValueError, match="timesteps from 300: x_t is not yet noise there; pass latents"):
        tiny_pipeline(timesteps=[300, 20, 0])


@pytest.mark.parametrize("total", [20, 50])
def test_default_is_all_timesteps(tiny_unet, total):
    pipe = DDPMPipeline(tiny_unet, DDPMScheduler(num_train_timesteps=total))
    pipe.set_progress_bar_config(disable=True)
    timesteps = []
    pipe(callback_on_step_end=lambda pipe, i, t, tensors: timesteps.append(int(t)))
    assert timesteps == list(range(total - 1, -1, -1))
    assert pipe.progressive(1, frames=None).timesteps == timesteps
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe(callback_on_step_end=lambda pipe, i, t, tensors: timesteps.append(int(t)))
    assert len(timesteps) == 2 * total


def test_larger_images_start_at_larger_timesteps(tiny_unet):
    # 20 leading steps start at 950, where alpha_bar is 1.06e-4: noise for 64 pixels, but not for 65,536, which show the
    # brightness together. 50 steps start at 980, with hardly more signal than at the last timestep.
    first = []
    pipe = DDPMPipeline(tiny_unet, DDPMScheduler())
    for size, count in [(8, 20), (256, 20), (256, 50)]:
        tiny_unet.register_to_config(sample_size=size)
        pipe._set_timesteps(count, None, from_noise=True)
        first.append(int(pipe.scheduler.timesteps[0]))
    assert first == [950, 999, 980]


def test_process_that_does_not_end_in_noise_causes_warning(tiny_unet, monkeypatch):
    warnings = []
    monkeypatch.setattr(hf_ddpm.pipelines.pipeline_ddpm.logger, "warning", warnings.append)
    for options in ({"num_train_timesteps": 50}, {"num_train_timesteps": 50, "beta_start": 2e-3, "beta_end": 0.4}):
        pipe = DDPMPipeline(tiny_unet, DDPMScheduler(**options))
        pipe.set_progress_bar_config(disable=True)
        pipe(num_inference_steps=2)
        pipe(num_inference_steps=2, latents=torch.zeros(1, 1, 8, 8))
    assert len(warnings) == 1 and "x_T of this process keeps 60.3% of the variance" in warnings[0]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (
            lambda pipe: pipe.unet.conv_in.weight.data.view(-1)[0].fill_(float("nan")),
            "not finite, such as conv_in.weight",
        ),
        (lambda pipe: pipe.unet.to(torch.float16).conv_out.bias.data.fill_(65000), "float16 may have overflowed"),
        (lambda pipe: pipe.unet.conv_out.bias.data.fill_(3e38), "out of range"),
    ],
)
def test_values_that_are_not_finite_raise_error(tiny_pipeline, spoil, reason):
    # Clipping would turn infinite predictions into black or white images.
    spoil(tiny_pipeline)
    hook = tiny_pipeline.unet.register_forward_hook(lambda module, inputs, output: (output.sample.mul_(2), output)[1])
    with pytest.raises(FloatingPointError, match=f"at step 0 of 3: .*{reason}"):
        tiny_pipeline(num_inference_steps=3)
    hook.remove()


def test_error_names_step_whose_values_are_not_finite(tiny_pipeline):
    def spoil(pipe, i, t, tensors):
        return {"latents": tensors["latents"] * float("inf")} if i == 1 else {}

    with pytest.raises(FloatingPointError, match="not finite at step 2 of 4"):
        tiny_pipeline(num_inference_steps=4, callback_on_step_end=spoil)


def test_schedulers_of_diffusers_with_wrong_settings_are_rejected(tiny_pipeline):
    config = tiny_pipeline.scheduler.config
    tiny_pipeline.scheduler = diffusers.DDIMScheduler.from_config(config, timestep_spacing="trailing")
    with pytest.raises(ValueError, match="use hf_ddpm.DDIMScheduler"):
        tiny_pipeline(num_inference_steps=334)
    tiny_pipeline.scheduler = diffusers.HeunDiscreteScheduler()  # with its default betas, 0.00085 to 0.012
    with pytest.raises(ValueError, match="its betas are not those .* create it by HeunDiscreteScheduler.from_config"):
        tiny_pipeline(num_inference_steps=20)
    tiny_pipeline.scheduler = DDIMScheduler.from_config(config)
    assert tiny_pipeline(num_inference_steps=7, output_type="pt").images.isfinite().all()


def test_ddim_scheduler_is_saved_and_loaded(tiny_pipeline, tmp_path):
    tiny_pipeline.scheduler = DDIMScheduler.from_config(tiny_pipeline.scheduler.config)
    tiny_pipeline.save_pretrained(tmp_path)
    loaded = DDPMPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is DDIMScheduler
    with pytest.raises(Exception, match="HFDDIMScheduler"):  # DDIM of diffusers would give other samples
        diffusers.DDPMPipeline.from_pretrained(tmp_path)


def test_schedulers_without_custom_timesteps_are_reported(tiny_pipeline):
    tiny_pipeline.scheduler = diffusers.DDIMScheduler.from_config(tiny_pipeline.scheduler.config)
    with pytest.raises(ValueError, match="timesteps: not supported by DDIMScheduler; use num_inference_steps instead"):
        tiny_pipeline(timesteps=[300, 0])


def test_eta_is_passed_to_ddim(tiny_pipeline):
    tiny_pipeline.scheduler = diffusers.DDIMScheduler.from_config(tiny_pipeline.scheduler.config)
    x_T = torch.randn(2, 1, 8, 8, generator=seeded())
    images = [
        tiny_pipeline(2, seeded(seed), 10, output_type="pt", latents=x_T, eta=eta).images
        for seed, eta in [(0, 0.0), (1, 0.0), (0, 1.0), (1, 1.0)]
    ]
    torch.testing.assert_close(images[0], images[1])
    assert not torch.equal(images[2], images[3])
    assert not torch.allclose(images[0], images[2], atol=0.01)
    # The amount of noise is that of the DDIM pipeline of diffusers.
    stock = diffusers.DDIMPipeline(tiny_pipeline.unet, tiny_pipeline.scheduler)
    stock.set_progress_bar_config(disable=True)
    for eta in (0.0, 0.5, 1.0):
        expected = stock(2, seeded(7), eta, 10, use_clipped_model_output=False, output_type="np").images
        actual = tiny_pipeline(2, seeded(7), 10, output_type="np", eta=eta).images
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_sampling_starts_from_given_latents(tiny_pipeline):
    x_T = torch.randn(2, 1, 8, 8, generator=seeded(5))
    sample = [tiny_pipeline(2, seeded(), 4, output_type="pt", latents=x_T).images for _ in range(2)]
    torch.testing.assert_close(*sample, rtol=0, atol=0)
    assert not torch.equal(sample[0], tiny_pipeline(2, seeded(), 4, output_type="pt", latents=-x_T).images)


class GaussianUNet(UNet2DModel):
    """The optimal network for images from N(m, s^2 I), which returns E[epsilon | x_t]."""

    MEAN, STD = 0.2, 0.25

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        bars = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
        # Euler evaluates the network at fractional timesteps.
        bar = float(np.exp(np.interp(float(timestep), range(1000), bars.log().numpy())))
        spread = bar * self.STD**2 + 1 - bar
        return UNet2DOutput((1 - bar) ** 0.5 * (sample - bar**0.5 * self.MEAN) / spread)


def sampled(scheduler, steps=50):
    """Return the samples of a pipeline, not clipped."""
    pipe, latents = DDPMPipeline(GaussianUNet(**{**TINY_UNET, "sample_size": 32}), scheduler), []
    pipe.set_progress_bar_config(disable=True)
    pipe(8, seeded(), steps, callback_on_step_end=lambda pipe, i, t, tensors: latents.append(tensors["latents"]))
    return latents[-1].double()


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        *(("DPMSolverMultistep", 50), ("UniPCMultistep", 50), ("PNDM", 50)),
        *(("DDIM", 200), ("EulerDiscrete", 200), ("EulerAncestralDiscrete", 200), ("DDPM", 200)),  # first order
    ],
)
def test_schedulers_of_diffusers_sample_data_of_optimal_network(name, steps):
    # For 8192 pixels the standard error of the mean is 0.003, that of the standard deviation 0.8%. With so few steps
    # the standard deviation is a few percent too small.
    config = DDPMScheduler(clip_sample=False).config
    images = sampled(getattr(diffusers, f"{name}Scheduler").from_config(config), steps)
    assert images.mean().item() == pytest.approx(GaussianUNet.MEAN, abs=0.02)
    assert images.std().item() == pytest.approx(GaussianUNet.STD, rel=0.06)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_initial_noise_is_scaled_for_schedulers_that_need_it(spacing):
    # Euler integrates dx/dsigma = eps for x = x_t / sqrt(alpha_bar), starting from noise with a standard deviation of
    # about sigma_max, here 157; the network gets x / sqrt(sigma^2 + 1). For the optimal network, eps = sigma (x - m) /
    # (sigma^2 + s^2), so each step multiplies x - m by a factor.
    scheduler = diffusers.EulerDiscreteScheduler.from_config(DDPMScheduler().config, timestep_spacing=spacing)
    images = sampled(scheduler)
    bars = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    times = {
        "leading": np.arange(0, 1000, 20)[::-1] + 0.0,
        "linspace": np.linspace(0, 999, 50)[::-1],
        "trailing": np.arange(1000, 0, -20) - 1.0,
    }[spacing]
    sigmas = np.append(np.interp(times, range(1000), np.sqrt((1 - bars) / bars)), 0)
    start = sigmas[0] if spacing != "leading" else np.hypot(sigmas[0], 1)
    x = torch.randn(8, 1, 32, 32, generator=seeded()).double() * start - GaussianUNet.MEAN
    for i, sigma in enumerate(sigmas[:-1]):
        x = x * (1 + (sigmas[i + 1] - sigma) * sigma / (sigma**2 + GaussianUNet.STD**2))
    torch.testing.assert_close(images, x + GaussianUNet.MEAN, rtol=0, atol=0.01)


def test_invalid_arguments_are_rejected(tiny_pipeline):
    for arguments, message in [
        ({"batch_size": 0}, "batch_size=0: expected at least 1"),
        ({"output_type": "jpg"}, "output_type='jpg': expected one of pil, np, pt, numpy"),
        ({"generator": [seeded()], "batch_size": 2}, "generator of 1 generators: expected .* list of 2, one per image"),
        ({"latents": torch.zeros(1, 1, 4, 4)}, r"latents of shape \(1, 1, 4, 4\): expected shape \(1, 1, 8, 8\)"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "unknown tensor 'noise'; expected latents"),
        ({"num_inference_steps": 1001}, "num_inference_steps=1001: expected 1 to 1000"),
    ]:
        with pytest.raises(ValueError, match=message):
            tiny_pipeline(**arguments)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_guidance_extrapolates_conditional_prediction(scale):
    # The network predicts c / 100 for class c, and 0.5 for "no class", which is index 11.
    class ConstantUNet(UNet2DModel):
        def forward(self, sample, timestep, class_labels=None, return_dict=True):
            output = torch.where(class_labels == 11, 0.5, class_labels / 100).view(-1, 1, 1, 1).expand_as(sample)
            return UNet2DOutput(torch.cat([output, output], dim=1))

    names = {str(index): f"class {index}" for index in range(11)}
    unet = ConstantUNet(**{**TINY_UNET, "out_channels": 2, "num_class_embeds": 12})
    pipe = DDPMPipeline(unet, DDPMScheduler(variance_type="learned_range"), names)
    outputs = []
    pipe(
        3, seeded(), 2, output_type="pt", class_labels=["class 2", 7, "class 10"], guidance_scale=scale,
        callback_on_step_end=lambda pipe, i, t, tensors: outputs.append(tensors["model_output"]),
        callback_on_step_end_tensor_inputs=["model_output"],
    )  # fmt: skip
    conditional = torch.tensor([0.02, 0.07, 0.1])
    torch.testing.assert_close(outputs[0][:, 0, 0, 0], 0.5 + scale * (conditional - 0.5))
    torch.testing.assert_close(outputs[0][:, 1, 0, 0], conditional)  # no guidance for the variance
    images = pipe(3, seeded(), 2, output_type="pt").images  # no class
    assert torch.equal(images, pipe(3, seeded(), 2, output_type="pt", class_labels=[11] * 3).images)


def test_class_labels_are_lists_or_arrays_of_integers_or_names():
    names = {str(index): str(index + 1) for index in range(10)}
    pipe = DDPMPipeline(UNet2DModel(**{**TINY_UNET, "num_class_embeds": 11}), DDPMScheduler(), names)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(2, seeded(), 2, output_type="pt", class_labels=["3", 7]).images
    for labels in (np.array([2, 7]), torch.tensor([2, 7], dtype=torch.uint8), [np.int64(2), "8"]):
        assert torch.equal(pipe(2, seeded(), 2, output_type="pt", class_labels=labels).images, expected)
    for labels, message in [
        ("12", "class_labels='12': expected a list of 2"),
        (3, "class_labels=3: expected a list of 2"),
        (torch.tensor([[2], [7]]), "class_labels=.*: expected a list of 2"),
        (torch.tensor([2.5, 7.0]), r"class_labels=\[2.5, 7.0\]: expected 2 integers from 0 to 10"),
        (np.array([2.5, 7.0]), "class_labels: unknown class 2.5; expected one of"),
        ([True, False], "class_labels: unknown class True; expected one of"),
        ([], r"class_labels=\[\]: expected 2 integers from 0 to 10"),
        ([2, 11], r"class_labels=\[2, 11\]: expected 2 integers from 0 to 10"),
    ]:
        with pytest.raises(ValueError, match=message):
            pipe(2, class_labels=labels)


def test_compiled_network_is_single_graph_for_all_steps(tiny_pipeline):
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph.forward

    tiny_pipeline.unet.compile(backend=compiler, fullgraph=True)
    tiny_pipeline(batch_size=2, num_inference_steps=3)
    assert len(graphs) == 1
    torch.compiler.reset()
