import io
import math
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image

from hf_ddpm import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from hf_ddpm.cli.demo import main
from hf_ddpm.data.transforms import ImageFormat, fit
from hf_ddpm.demo.demo import Demo, whole_number
from hf_ddpm.images import to_bytes, to_signed
from hf_ddpm.sampling.samplers import SCHEDULERS
from hf_ddpm.utils.markdown import plain
from hf_ddpm.utils.seeds import FIGURES, SAMPLES, generator
from tests.conftest import LIMIT, TINY_UNET, load_script
from tests.utils.test_markdown import HOSTILE, parse


@pytest.fixture
def demo(tiny_pipeline):
    return Demo(tiny_pipeline, "tiny")


@pytest.fixture
def class_demo():
    """A demo with the classes zero, one and two, and a null class."""
    torch.manual_seed(0)
    unet = UNet2DModel(**TINY_UNET, num_class_embeds=4)
    return Demo(DDPMPipeline(unet, DDPMScheduler(), {"0": "zero", "1": "one", "2": "two"}), "classes")


def end(previews):
    return list(previews)[-1].images


def other_sizes(**config):
    return Demo(DDPMPipeline(UNet2DModel(**{**TINY_UNET, **config}), DDPMScheduler()), "other")


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_images_equal_those_of_sample_script(trained, tmp_path, scheduler):
    steps = 50 if scheduler in ("pndm", "euler") else 4  # these two fail with fewer steps
    options = ["--num_images", "5", "--seed", "3", "--num_inference_steps", str(steps), "--scheduler", scheduler]
    load_script("sample").main(["--model", str(trained), "--output", str(tmp_path), *options, "--batch_size", "2"])
    files = [np.asarray(Image.open(path)) for path in sorted(tmp_path.glob("0*.png"))]
    demo = Demo(DDPMPipeline.from_pretrained(trained), "trained")
    images = end(demo.generate(demo.read(3, steps, scheduler), 5))
    np.testing.assert_array_equal(images.squeeze(1), np.stack(files))


@pytest.mark.parametrize(
    ("scheduler", "prediction_type"),
    # PNDM of diffusers only supports epsilon and v predictions.
    sorted({*product(SCHEDULERS, ["epsilon", "sample", "v_prediction"])} - {("pndm", "sample")}),
)
def test_preview_shows_estimated_image_instead_of_noise(scheduler, prediction_type):
    # The ideal network for a dataset of one image always estimates that image, while x_t is mostly noise.
    image = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1

    class IdealNetwork(UNet2DModel):
        def forward(self, sample, timestep, class_labels=None, return_dict=True):
            bar = float(bars[int(timestep)])
            noise = (sample - math.sqrt(bar) * image) / math.sqrt(1 - bar)
            predictions = {
                "epsilon": noise,
                "sample": image.expand_as(sample),
                "v_prediction": math.sqrt(bar) * noise - math.sqrt(1 - bar) * image,
            }
            return type("Output", (), {"sample": predictions[prediction_type]})

    pipe = DDPMPipeline(IdealNetwork(**TINY_UNET), DDPMScheduler(prediction_type=prediction_type))
    bars = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    demo = Demo(pipe, "ideal")
    expected = ((image + 1) * 127.5).expand(2, -1, -1, -1)
    first, *others = demo.generate(demo.read(0, 20, scheduler), 2)
    # The other schedulers do not return an estimate, so their first preview shows the initial noise.
    for preview in [first, *others] if scheduler in ("ddpm", "ddim", "euler") else others:
        assert (preview.images - expected).abs().max() <= 4, preview


def test_concurrent_requests_do_not_interfere(demo):
    requests = [(demo.read(0, 7, "ddpm"), 2), (demo.read(1, 12, "ddpm"), 3)]
    alone = [end(demo.generate(*request)) for request in requests]
    barrier, local = threading.Barrier(2), threading.local()

    def wait_for_the_other(*args):
        if not hasattr(local, "waited"):
            local.waited = barrier.wait(LIMIT)

    demo.pipe.unet.register_forward_pre_hook(wait_for_the_other)
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda request: end(demo.generate(*request)), requests))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_closing_request_ends_its_thread(demo):
    before, steps = set(threading.enumerate()), []
    demo.pipe.unet.register_forward_hook(lambda *args: steps.append(1))
    previews = demo.generate(demo.read(0, 1000, "ddpm"), 1)
    next(previews)
    (worker,) = set(threading.enumerate()) - before
    previews.close()
    worker.join(LIMIT)
    assert not worker.is_alive() and len(steps) < 1000


def test_interpolation_at_t_0_mixes_pixels(demo):
    first, second = (torch.randint(256, (1, 1, 8, 8), dtype=torch.uint8) for _ in range(2))
    assert end(demo.interpolate(first, second, 30, 3, demo.read(5, 10, "ddpm"))).shape == (3, 1, 8, 8)
    # At t = 0 almost no noise is added, so the result is the mixture of the pixels.
    images = end(demo.interpolate(first, second, 0, 5, demo.read(5, 10, "ddpm")))
    for i, image in enumerate(images):
        mixed = (1 - i / 4) * first.float() + i / 4 * second.float()
        assert (image - mixed).abs().max() < 10


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim"])
@pytest.mark.parametrize(
    ("steps", "expected"),
    # The last steps of 4, or of at most t + 1 = 31, equal parts of 31 steps.
    [(4, [30, 22, 14, 6]), (1, [30]), (31, range(30, -1, -1)), (1000, range(30, -1, -1))],
)
def test_interpolation_uses_requested_steps(demo, scheduler, steps, expected):
    image, timesteps = torch.zeros(1, 1, 8, 8, dtype=torch.uint8), []
    demo.pipe.unet.register_forward_hook(lambda *args: timesteps.append(int(args[1][1])))
    previews = list(demo.interpolate(image, image, 30, 2, demo.read(0, steps, scheduler)))
    assert timesteps == list(expected) and previews[-1].steps == len(timesteps)


def test_interpolation_uses_requested_sampler(demo):
    first, second = (torch.randint(256, (1, 1, 8, 8), dtype=torch.uint8) for _ in range(2))
    images = {name: end(demo.interpolate(first, second, 600, 3, demo.read(5, 6, name))) for name in ("ddpm", "ddim")}
    own = DDPMPipeline(demo.pipe.unet, DDIMScheduler.from_config(demo.pipe.scheduler.config))
    draw, weights = generator(5, FIGURES), [0.0, 0.5, 1.0]
    unit = own.interpolate(to_signed(first), to_signed(second), 600, weights, draw, "pt", num_inference_steps=6)
    assert torch.equal(images["ddim"], to_bytes(unit)) and not torch.equal(images["ddim"], images["ddpm"])


def test_interpolation_in_few_steps_uses_small_variance(demo):
    # The model's variance, fixed_large, is only used with all steps from t: with fewer steps it leaves grain.
    image, variances = torch.zeros(1, 1, 8, 8, dtype=torch.uint8), []

    def interpolate(steps):
        for _ in demo.interpolate(image, image, 30, 2, demo.read(0, steps, "ddpm")):
            pass

    def record(pipe, *args, **options):
        variances.append(pipe.scheduler.config.variance_type)
        return decode(pipe, *args, **options)

    decode = DDPMPipeline.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DDPMPipeline, "decode", record)
        for steps in (30, 31, 1000):
            interpolate(steps)
    assert variances == ["fixed_small", "fixed_large", "fixed_large"]


def test_interpolation_noise_is_separate_random_stream(tiny_unet):
    demo = Demo(DDPMPipeline(tiny_unet, DDPMScheduler(num_train_timesteps=20, beta_end=0.4)), "short")
    first, second = torch.zeros(2, 1, 1, 8, 8, dtype=torch.uint8)

    def between(seed):
        return end(demo.interpolate(first, second, 10, 2, demo.read(seed, 10, "ddpm")))

    assert torch.equal(between(0), between(0)) and not torch.equal(between(0), between(1))
    with torch.no_grad():
        with_sampling_noise = demo.pipe.interpolate(
            to_signed(first), to_signed(second), 10, [0.0, 1.0], generator(0, SAMPLES, 0), output_type="pt"
        )
    assert not torch.equal((with_sampling_noise * 255).round().to(torch.uint8), between(0))


def png(image):
    with io.BytesIO() as file:
        image.save(file, format="PNG")
        return file.getvalue()


def painted(mask, scale):
    """Return a layer with painted pixels, as the editor sends it."""
    layer = np.zeros((*mask.shape, 4), np.uint8)
    layer[mask.numpy()] = 224, 64, 64, 255
    return png(Image.fromarray(layer).resize((8 * scale, 8 * scale), Image.Resampling.NEAREST))


@pytest.mark.parametrize("scale", [1, 60])
def test_read_drawing_returns_image_and_mask(demo, scale):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    background = Image.fromarray(pixels).resize((8 * scale, 8 * scale), Image.Resampling.NEAREST).convert("RGBA")
    first, second = torch.zeros(2, 8, 8, dtype=torch.bool)
    first[5:], second[0, 3] = True, True
    image, mask = demo.read_drawing(png(background), [painted(first, scale), painted(second, scale)])
    assert np.array_equal(image[0, 0], pixels) and torch.equal(mask, first | second)


def test_invalid_drawing_raises_one_line_error(demo):
    image, layer = png(Image.new("RGB", (8, 8))), painted(torch.ones(8, 8, dtype=torch.bool), 1)
    noise = png(Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200), np.uint8)))
    for drawing, message in [
        ((None, [layer]), "image is missing: upload or sample an image"),
        ((image, []), "nothing is painted: paint over the area to fill"),
        ((image, [painted(torch.zeros(8, 8, dtype=torch.bool), 1)]), "nothing is painted"),
        ((b"no image", [layer]), "image: unknown image format"),
        ((image, [b"no image"]), "layer: unknown image format"),
        ((noise[: len(noise) // 2], [layer]), "image: image file is truncated"),
        ((png(Image.new("RGB", (4, 4))), [layer]), "image: size 4x4 is smaller than the resolution 8x8"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            demo.read_drawing(*drawing)
        assert "\n" not in str(caught.value)
    mask = torch.ones(8, 8, dtype=torch.bool)
    for count, passes, message in [
        (0, 5, "count=0: expected"),
        (1, 21, "repeats=21: expected a whole number from 1 to"),
    ]:
        with pytest.raises(ValueError, match=message):
            demo.inpaint(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), mask, count, passes, demo.read(0, 5, "ddpm"))


def test_inpainting_equals_pipeline_and_keeps_other_pixels(class_demo):
    image = torch.randint(256, (1, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[4:] = True
    previews = list(class_demo.inpaint(image, mask, 3, 2, class_demo.read(7, 10, "ddpm", ["two", "zero"], 2.0)))
    # Jumps of 2 steps, a fifth of 10, from steps 0, 2, 4 and 6.
    assert previews[-1].steps == 10 + 4 * 2 and previews[-1].step == previews[-1].steps
    fills = previews[-1].images
    assert torch.equal(fills[..., ~mask], image[..., ~mask].expand(3, -1, -1))
    expected = class_demo.pipe.inpaint(
        to_signed(image).expand(3, -1, -1, -1), mask, [generator(7, SAMPLES, i) for i in range(3)], 10,
        jump_length=2, jump_n_sample=2, class_labels=["two", "zero", "two"], guidance_scale=2.0, output_type="pt",
    ).images  # fmt: skip
    assert torch.equal(fills, to_bytes(expected))


def test_classes_are_selected_by_name_and_used_in_turn(class_demo):
    labels = []
    class_demo.pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: labels.append(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    assert class_demo.classes == ["zero", "one", "two"]
    end(class_demo.generate(class_demo.read(0, 1, "ddpm", ["two", "zero"], 1.0), 3))
    end(class_demo.generate(class_demo.read(0, 1, "ddpm", [], 1.0), 2))
    image = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    end(class_demo.interpolate(image, image, 0, 2, class_demo.read(0, 1, "ddpm", ["one", "two"], 2.0)))
    assert labels == [[2, 0, 2], [3, 3], [1, 1, 3, 3]]


def test_classes_without_names_are_indices():
    demo = other_sizes(num_class_embeds=3)
    assert demo.classes == ["0", "1", "2"]
    assert end(demo.generate(demo.read(0, 1, "ddpm", ["2"]), 1)).shape == (1, 1, 8, 8)
    with pytest.raises(ValueError, match="class_labels are missing"):
        end(demo.generate(demo.read(0, 1, "ddpm"), 1))


@pytest.mark.parametrize(
    ("invalid", "message"),
    [
        ({"seed": 1.5}, "seed=1.5: expected a whole number from 0"),
        ({"seed": None}, "seed=None: expected a whole number"),
        ({"seed": -1}, "seed=-1: expected a whole number"),
        ({"steps": 0}, "steps=0: expected a whole number from 1 to 1000"),
        ({"steps": 1001}, "steps=1001: expected a whole number"),
        ({"steps": float("nan")}, "steps=nan: expected a whole number"),
        ({"count": 0}, "count=0: expected a whole number from 1 to 64"),
        ({"count": 65.0}, "count=65: expected a whole number"),
        ({"scheduler": "heun"}, "scheduler='heun': expected one of"),
        ({"scheduler": "pndm", "steps": 3}, "--num_inference_steps 3: expected 4 to 1000 with this model"),
        ({"classes": ["three"]}, "class_labels: unknown class 'three'; expected one of \\['zero', 'one', 'two'\\]"),
    ],
)
def test_invalid_request_raises_one_line_error(class_demo, invalid, message):
    request = {"seed": 0, "steps": 1, "scheduler": "ddpm", "classes": [], "count": 1} | invalid
    count = request.pop("count")
    with pytest.raises(ValueError, match=message) as caught:
        end(class_demo.generate(class_demo.read(**request), count))
    assert "\n" not in str(caught.value)


def test_invalid_interpolation_raises_one_line_error(demo):
    image, sampling = torch.zeros(1, 1, 8, 8, dtype=torch.uint8), demo.read(0, 1, "ddpm")
    with pytest.raises(ValueError, match="t=1000: expected a whole number from 0 to 999"):
        demo.interpolate(image, image, 1000, 2, sampling)
    with pytest.raises(ValueError, match="count=1: expected a whole number from 2 to 64"):
        demo.interpolate(image, image, 0, 1, sampling)


def test_whole_number_returns_integer():
    for value in (3, 3.0):
        assert whole_number("n", value, 3, 3) == 3 and isinstance(whole_number("n", value, 3, 3), int)


def test_uploaded_image_is_resized_as_for_training(demo, tmp_path):
    path = tmp_path / "wide.png"
    Image.effect_noise((40, 20), 80).convert("RGB").save(path)
    expected = fit({"bytes": path.read_bytes(), "path": None}, ImageFormat(8, 8, 1))
    np.testing.assert_array_equal(demo.read_image("First image", str(path)), expected[np.newaxis])


def test_background_color_of_transparent_pixels(tiny_pipeline, tmp_path):
    Image.new("LA", (8, 8), (200, 0)).save(tmp_path / "a.png")
    for background, gray in (("white", 255), ("#404040", 64)):
        demo = Demo(tiny_pipeline, "tiny", background=background)
        assert (demo.read_image("first image", str(tmp_path / "a.png")) == gray).all()


def test_background_option_of_command_line(tiny_pipeline, tmp_path, monkeypatch):
    served = []
    monkeypatch.setattr("hf_ddpm.demo.app.serve", served.append)
    tiny_pipeline.save_pretrained(tmp_path)
    assert main(["--model", str(tmp_path), "--background", "#010203"]) == 0
    assert [demo.background for demo in served] == ["#010203"]


def test_error_names_invalid_image(demo, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    Image.new("L", (7, 9)).save(tmp_path / "small.png")
    for path, reason in [
        (None, " is missing: upload an image"),
        (str(tmp_path / "small.png"), ": size 9x7 is smaller than the resolution 8x8"),
        (str(tmp_path / "text.png"), ": unknown image format; expected one of PNG"),
    ]:
        with pytest.raises(ValueError, match=f"^Second image{reason}"):
            demo.read_image("Second image", path)


@pytest.mark.parametrize(("size", "expected"), [(8, 64), (64, 64), (128, 16), (256, 4), ((256, 128), 8), (2048, 2)])
def test_maximum_number_of_images_depends_on_their_size(size, expected):
    assert other_sizes(sample_size=size).max_images == expected


@pytest.mark.parametrize(("size", "expected"), [(8, 16), (64, 16), (128, 4), (256, 1), (2048, 1)])
def test_default_number_of_images_is_at_most_quarter_of_maximum(size, expected):
    demo = other_sizes(sample_size=size)
    assert demo.default_images == expected <= max(1, demo.max_images // 4)


@pytest.mark.parametrize(("total", "steps"), [(1000, 50), (20, 20)])
def test_default_request_can_be_sampled(total, steps):
    process = DDPMScheduler(num_train_timesteps=total, beta_end=20 / total)
    for classes, names, expected, scale in [
        (None, None, [], 1.0),
        (5, None, ["0", "1", "2", "3"], 1.0),
        (2, {"0": "cat"}, ["cat"], 2.0),
    ]:
        pipe = DDPMPipeline(UNet2DModel(**TINY_UNET, num_class_embeds=classes), process, names)
        demo = Demo(pipe, "default")
        request = demo.default_request
        assert (request.num_inference_steps, request.class_labels, request.guidance_scale) == (steps, expected, scale)
        assert demo.required_class == (["0"] if classes == 5 else [])
        assert end(demo.generate(request, 1)).shape == (1, 1, 8, 8)


def test_describe_model(demo):
    count = sum(weight.numel() for weight in demo.pipe.unet.parameters())
    line = demo.describe()
    assert line.startswith("**tiny** ") and f" {count:,} parameters " in line
    for fact in ("8x8 pixels, gray", "trained with 1,000 steps", "runs on a CPU"):
        assert f" {fact}" in line
    assert "32x16 pixels, RGB" in other_sizes(sample_size=(32, 16), in_channels=3, out_channels=3).describe()


def test_description_links_to_model(tiny_pipeline):
    line = Demo(tiny_pipeline, "org/a_b", "https://hub/org/a_b").describe()
    _, inline, _ = parse(line)
    (link,) = [child for child in inline.children if child.type == "link_open"]
    assert link.attrs["href"] == "https://hub/org/a_b" and line.startswith("[**org/a_b**](")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_model_name_is_escaped_in_description(tiny_pipeline, name):
    _, inline, _ = parse(Demo(tiny_pipeline, name).describe())
    assert {child.type for child in inline.children} == {"text", "strong_open", "strong_close"}
    assert "".join(child.content for child in inline.children).startswith(f"{plain(name)} · ")


def test_formats_that_run_external_programs_are_refused_by_content(demo, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("subprocess.Popen", lambda *args, **options: started.append(args))
    for file in ("drawing.eps", "drawing.png"):
        Image.new("L", (9, 9)).save(tmp_path / file, format="EPS")
        with pytest.raises(ValueError, match="First image: unknown image format"):
            demo.read_image("First image", str(tmp_path / file))
    assert not started


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_common_formats_are_read(demo, tmp_path, kind):
    Image.new("L", (8, 8), 200).save(tmp_path / "image", format=kind)
    pixels = demo.read_image("First image", str(tmp_path / "image"))
    assert pixels.shape == (1, 1, 8, 8) and (pixels.int() - 200).abs().max() <= 2


def bitmap(width, height):
    """Return the header of a BMP file with a given size, without pixels."""
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(("width", "height"), [(7072, 7072), (10_000, 10_000), (65_000, 65_000)])
def test_too_many_pixels_are_refused_without_decoding(demo, tmp_path, monkeypatch, width, height):
    monkeypatch.setattr("hf_ddpm.demo.demo.attempt", lambda *row: pytest.fail("decoded"))
    (tmp_path / "huge.bmp").write_bytes(bitmap(width, height))
    with pytest.raises(ValueError, match=r"^First image: .*too many.*; expected at most 50,000,000$"):
        demo.read_image("First image", str(tmp_path / "huge.bmp"))


def test_fewer_pixels_than_limit_are_decoded(demo, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_ddpm.demo.demo.attempt", lambda *row: "decoded")
    (tmp_path / "large.bmp").write_bytes(bitmap(7071, 7071))  # 7071^2 = 49,999,041
    with pytest.raises(ValueError, match="decoded"):
        demo.read_image("First image", str(tmp_path / "large.bmp"))


def test_sampling_uses_precision_of_demo(demo):
    types = []
    demo.pipe.unet.conv_in.register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
    half, ends = Demo(demo.pipe, "half", precision="bf16"), torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    for one, expected in ((demo, torch.float32), (half, torch.bfloat16)):
        del types[:]
        sampling = one.read(0, 2, "ddpm")
        end(one.generate(sampling, 2))
        end(one.interpolate(ends, ends, 1, 2, sampling))
        assert len(types) == 4 and set(types) == {expected}
    assert demo.describe().endswith("runs on a CPU") and half.describe().endswith("runs on a CPU in bf16")
