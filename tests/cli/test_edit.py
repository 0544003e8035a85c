import json

import numpy as np
import pytest
import torch
from PIL import Image

from hf_ddpm import DDIMScheduler, DDPMPipeline
from hf_ddpm.sampling import edits
from hf_ddpm.utils.launch import exclusive
from hf_ddpm.utils.seeds import SAMPLES, generator
from tests.conftest import load_script

SHORT = ["--jump_length", "1", "--jump_n_sample", "2", "--num_inference_steps", "3"]


@pytest.fixture(scope="module")
def main():
    return load_script("edit").main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of images, and one with a mask for each: the lower half, nothing, the upper half."""
    path = tmp_path_factory.mktemp("pictures")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8), np.uint8)
    masks = np.zeros((3, 8, 8), np.uint8)
    masks[0, 4:], masks[2, :4] = 255, 255
    for name, images in (("pictures", pixels), ("masks", masks)):
        (path / name).mkdir()
        for letter, image in zip("abc", images, strict=True):
            Image.fromarray(image).save(path / name / f"{letter}.png")
    return path


def loaded(folder, names="abc"):
    return np.stack([np.asarray(Image.open(folder / f"{name}.png")) for name in names])


def test_inpaint_fills_white_pixels_of_masks(main, trained, folder, tmp_path):
    words = ["inpaint", "--model", str(trained), "--images", str(folder / "pictures"), "--seed", "3", *SHORT]
    assert main([*words, "--masks", str(folder / "masks"), "--output", str(tmp_path / "all")]) == 0
    filled, pixels, is_filled = loaded(tmp_path / "all"), loaded(folder / "pictures"), loaded(folder / "masks") > 0
    assert np.array_equal(filled[~is_filled], pixels[~is_filled]) and (filled != pixels)[is_filled].mean() > 0.9

    pipe = DDPMPipeline.from_pretrained(trained)
    pipe.set_progress_bar_config(disable=True)
    sources = [generator(3, SAMPLES, i) for i in range(3)]
    pictures = [Image.fromarray(image) for image in pixels]
    expected = pipe.inpaint(pictures, is_filled, sources, 3, jump_length=1, jump_n_sample=2).images
    assert np.array_equal(filled, np.stack([np.asarray(picture) for picture in expected]))

    assert main([*words, "--masks", str(folder / "masks"), "--output", str(tmp_path / "b"), "--batch_size", "2"]) == 0
    assert np.array_equal(loaded(tmp_path / "b"), filled)
    record = json.loads((tmp_path / "all" / "edit.json").read_text())
    assert record["edit"] == "inpaint" and record["seed"] == 3 and record["num_inference_steps"] == 3
    assert Image.open(tmp_path / "all" / "grid.png").size[1] == 6 + 3 * 70
    page = np.asarray(Image.open(tmp_path / "all" / "grid.png"))[-3 * 70 :, -3 * 70 :]  # a row of tiles each
    tiles = page.reshape(3, 70, 3, 70).transpose(0, 2, 1, 3)[:, :, :64:8, :64:8]
    assert np.array_equal(tiles, [pixels, np.where(is_filled, 128, pixels), filled])


def test_one_mask_may_be_used_for_all_images_and_one_image_needs_no_folder(main, trained, folder, tmp_path):
    mask = folder / "masks" / "a.png"
    words = ["inpaint", "--model", str(trained), "--masks", str(mask), *SHORT]
    main([*words, "--images", str(folder / "pictures"), "--output", str(tmp_path / "all")])
    main([*words, "--images", str(folder / "pictures" / "a.png"), "--output", str(tmp_path / "one")])
    filled, pixels = loaded(tmp_path / "all"), loaded(folder / "pictures")
    assert np.array_equal(filled[:, :4], pixels[:, :4]) and all((filled != pixels)[:, 4:].mean((1, 2)) > 0.9)
    assert np.array_equal(loaded(tmp_path / "one", "a"), filled[:1])


def test_masks_of_size_of_images_are_cropped_and_resized_like_them(tmp_path):
    """An image of 32x16 pixels becomes 8x8: its central square at half the size."""
    pattern = np.random.default_rng(0).integers(0, 2, (8, 8)).astype(np.uint8) * 255
    wide = np.full((16, 32), 255, np.uint8)
    wide[:, 8:24] = pattern.repeat(2, axis=0).repeat(2, axis=1)
    mask, picture, other = (tmp_path / f"{name}.png" for name in ("mask", "picture", "other"))
    Image.fromarray(wide).save(mask)
    Image.fromarray(wide).convert("RGB").save(picture)
    Image.new("L", (16, 32)).save(other)
    assert np.array_equal(edits.read_mask_files(mask, [picture], (8, 8))[0, 0], pattern > 0)
    for files in ([other], [picture, other]):
        with pytest.raises(ValueError, match="mask.png: mask is unusable: masks of shape .16, 32.: expected"):
            edits.read_mask_files(mask, files, (8, 8))


def test_masks_without_white_pixels_are_reported(main, trained, folder, tmp_path, capsys):
    words = ["inpaint", "--model", str(trained), "--images", str(folder / "pictures"), *SHORT]
    main([*words, "--masks", str(folder / "masks"), "--output", str(tmp_path / "some")])
    line = "1 image will not change, because the mask has no white pixel, such as b.png\n"
    assert line in capsys.readouterr().out
    Image.fromarray(np.full((8, 8), 2, np.uint8)).save(tmp_path / "labels.png")  # numbers of segments
    with pytest.raises(ValueError, match="--masks .*labels.png: no mask has a white pixel at 8x8; expected white"):
        main([*words, "--masks", str(tmp_path / "labels.png"), "--output", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


def test_mask_may_have_any_name(folder, tmp_path):
    mask = tmp_path / "grid.png"
    Image.open(folder / "masks" / "a.png").save(mask)
    masks = edits.read_mask_files(mask, [folder / "pictures" / f"{name}.png" for name in "abc"], (8, 8))
    assert masks.shape == (3, 1, 8, 8) and masks[:, :, 4:].all() and not masks[:, :, :4].any()


def test_errors_for_unreadable_folders_are_one_line(tmp_path, monkeypatch):
    def iterdir(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(edits.Path, "iterdir", iterdir)
    with pytest.raises(ValueError, match="^--masks .*: cannot be read: Permission denied$"):
        edits.find_images("masks", tmp_path)


def test_variations_equal_pipeline_variations(main, trained, folder, tmp_path):
    words = ["--model", str(trained), "--images", str(folder / "pictures"), "--output", str(tmp_path / "out")]
    main(["vary", *words, "--strength", "0.01", "--num_inference_steps", "4"])
    pipe = DDPMPipeline.from_pretrained(trained)
    pipe.set_progress_bar_config(disable=True)
    pictures = [Image.open(folder / "pictures" / f"{name}.png") for name in "abc"]
    sources = [generator(0, SAMPLES, i) for i in range(3)]
    expected = pipe.vary(pictures, 0.01, sources, num_inference_steps=4)
    assert np.array_equal(loaded(tmp_path / "out"), np.stack([np.asarray(picture) for picture in expected]))


def test_sampling_from_inverted_noise_reproduces_image(main, trained, folder, tmp_path, capsys):
    words = ["--model", str(trained), "--images", str(folder / "pictures"), "--output", str(tmp_path / "out")]
    main(["invert", *words, "--num_inference_steps", "5", "--num_iterations", "1"])
    pipe = DDPMPipeline.from_pretrained(trained)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
    page = np.asarray(Image.open(tmp_path / "out" / "grid.png"))[-2 * 70 : -70, -3 * 70 :]
    noise = torch.tensor(np.stack([np.load(tmp_path / "out" / f"{name}.npy") for name in "abc"]))
    assert noise.dtype == torch.float32 and noise.shape == (3, 1, 8, 8)
    drawn = page.reshape(70, 3, 70).transpose(1, 0, 2)[:, :64:8, :64:8]
    assert np.abs(drawn - (noise[:, 0] / 2 + 0.5).clamp(0, 1).numpy() * 255).max() <= 1
    written = loaded(tmp_path / "out")
    sampled = pipe(3, latents=noise, num_inference_steps=5).images
    assert np.abs(np.stack([np.asarray(picture) for picture in sampled]).astype(int) - written).max() <= 1
    error = np.sqrt(np.square(written.astype(float) - loaded(folder / "pictures")).mean())
    assert f"reconstructions: {error:.3g}, for pixel values in [0, 255]" in capsys.readouterr().out


def test_run_does_not_write_to_folder_of_another_run(main, trained, folder, tmp_path, monkeypatch):
    words = ["vary", "--model", str(trained), "--images", str(folder / "pictures"), "--output", str(tmp_path)]
    short = ["--strength", "0.01", "--num_inference_steps", "1"]
    with exclusive(tmp_path), pytest.raises(ValueError, match="--output .*: folder is in use by another run"):
        main([*words, *short])
    load = edits.load_pipeline

    def meanwhile(*args):
        (tmp_path / "a.png").write_text("of another run, since the check")
        return load(*args)

    monkeypatch.setattr(edits, "load_pipeline", meanwhile)
    with pytest.raises(ValueError, match="--output .*: folder is not empty; expected a new or empty folder"):
        main([*words, *short])
    assert (tmp_path / "a.png").read_text() == "of another run, since the check"
    (tmp_path / "a.png").unlink()
    monkeypatch.setattr(edits, "load_pipeline", load)
    assert main([*words, *short]) == 0  # the lock of the failed run is released


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "^command is missing; expected one of inpaint, vary, invert; see --help$"),
        ("inpant --model m", "unknown command 'inpant': did you mean inpaint?"),
        ("vary --model m", "^--images, --output are missing; see --help$"),
        ("inpaint --model m --images pictures --output o", "^--masks is missing; expected one mask file for all im"),
        ("vary --model m --images nowhere --output o", "--images nowhere: expected an existing file"),
        ("vary --model m --images pictures --output masks", "--output masks: folder is not empty"),
        ("vary --model m --images pictures --output o --strength 0", r"--strength 0.0: expected a number in \(0, 1\]"),
        ("vary --model m --images pictures --output o --masks masks", "unknown option --masks"),
        ("inpaint --model m --images pictures --output o --masks no", "--masks no: expected an existing"),
        ("inpaint --model MODEL --images pictures --output o --masks large.png",
         r"large.png: mask is unusable: masks of shape \(9, 9\): expected"),
        ("inpaint --model MODEL --images pictures --output o --masks few",
         "mask for pictures/b.png is missing; expected b.png"),
        ("inpaint --model MODEL --images pictures --output o --masks text.png",
         "text.png: mask is unusable: not an im"),
        ("inpaint --model MODEL --images text.png --output o --masks masks",
         "text.png: image is unusable: not an image"),
        ("vary --model MODEL --images empty --output o", "--images empty: folder contains no images"),
        ("vary --model MODEL --images twice --output o", "a.jpg and a.png have the same name"),
        ("vary --model m --images grid.png --output o", "the result of the image named grid would replace grid.png"),
        ("vary --model m --images grids --output o", "the result of the image named grid would replace grid.png"),
        ("vary --model MODEL --images pictures --output o --strength 0.01 --num_inference_steps 11",
         "--num_inference_steps 11: expected at most the 10 steps of --strength 0.01"),
        ("invert --model MODEL --images pictures --output o --num_inference_steps 1001",
         "num_inference_steps=1001: expected 1 to 1000"),
    ],
)  # fmt: skip
def test_invalid_edit_options_are_one_line(main, trained, folder, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    for name in ("pictures", "masks"):
        (tmp_path / name).symlink_to(folder / name)
    for name in ("few", "empty", "twice", "grids"):
        (tmp_path / name).mkdir()
    one = Image.open(folder / "masks" / "a.png")
    for file in "few/a.png twice/a.png twice/a.jpg empty/grid.png empty/.a.png grid.png grids/grid.jpg".split():
        one.save(file)
    Image.new("L", (9, 9)).save("large.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=message) as caught:
        main(words.replace("MODEL", str(trained)).split())
    assert "\n" not in str(caught.value) and not (tmp_path / "o").exists()
