import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image

import hf_ddpm
import hf_ddpm.sampling.folder
from hf_ddpm import DDPMPipeline, DDPMScheduler, UNet2DModel
from hf_ddpm.models.precision import Choice, cast_copy
from hf_ddpm.provenance import model_checksum
from hf_ddpm.sampling.folder import ImageFolder, SampleFolder, open_samples
from hf_ddpm.sampling.generate import compile_for_sampling, fill_folder, generate_images
from hf_ddpm.sampling.options import Sampling
from hf_ddpm.sampling.samplers import SCHEDULERS, find_scheduler
from hf_ddpm.utils.launch import exclusive
from tests.conftest import TINY_UNET, load_script

ROOT = Path(__file__).parents[2]
FOUR_STEPS = Sampling(num_inference_steps=4)
CLASSES = {str(digit): str(digit) for digit in range(10)}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(hf_ddpm.sampling.folder, "SHARD_SIZE", 4)


@pytest.fixture
def pipe(trained):
    pipe = DDPMPipeline.from_pretrained(trained)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def fill(pipe, path, count, sampling=FOUR_STEPS, batch_size=3):
    return fill_folder(pipe, path, count, sampling, model="m", batch_size=batch_size, state=PartialState(cpu=True))


def images(folder):
    return folder[torch.arange(len(folder))]


@pytest.fixture(scope="module")
def ten(trained, tmp_path_factory):
    """Ten images, sampled without a folder."""
    pipe = DDPMPipeline.from_pretrained(trained)
    pipe.set_progress_bar_config(disable=True)
    made = generate_images(pipe, range(10), Sampling(0, 4), batch_size=10)
    return torch.stack([image for _, image in made])


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_images_of_folder_do_not_depend_on_batch_size(pipe, ten, tmp_path, batch_size):
    folder = fill(pipe, tmp_path, 10, batch_size=batch_size)
    assert len(folder) == 10 and torch.equal(images(folder), ten)
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == ["000000.npy", "000001.npy", "000002.npy"]
    assert [len(np.load(path)) for path in sorted((tmp_path / "shards").iterdir())] == [4, 4, 2]


@pytest.fixture(scope="module")
def conditional():
    """A network of ten classes and a null class, whose output depends on the class as much as on the image."""
    torch.manual_seed(0)
    unet = UNet2DModel(**TINY_UNET, num_class_embeds=11).eval()
    unet.class_embedding.weight.data *= 5
    pipe = DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=20, beta_end=0.4), CLASSES)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# Settings whose images must not depend on batches and processes.
KINDS = {
    "no class": {},
    "classes": {"class_labels": ["3", "7", "1"]},
    "guidance": {"class_labels": ["3", "7"], "guidance_scale": 3.0},
    "guided ddim": {"class_labels": ["3", "7", "1"], "guidance_scale": 2.0, "scheduler": "ddim", "eta": 0.5},
}


def by_hand(pipe, count, sampling):
    """Return images that are sampled one by one, each with its own class."""
    labels = sampling.class_labels
    one_by_one = []
    for i in range(count):
        alone = replace(sampling, class_labels=[labels[i % len(labels)]] if labels else [])
        one_by_one += [image for _, image in generate_images(pipe, [i], alone, batch_size=1)]
    return torch.stack(one_by_one)


@pytest.mark.parametrize("words", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_noise_and_class_of_image_i_do_not_depend_on_batch(conditional, tmp_path, words, batch_size):
    sampling = Sampling(seed=5, num_inference_steps=4, **words)
    expected = by_hand(conditional, 7, sampling)
    assert len({image.numpy().tobytes() for image in expected}) == 7
    if sampling.class_labels:
        others = by_hand(conditional, 2, replace(sampling, class_labels=["7", "3"]))
        assert not torch.equal(others[0], expected[0]) and not torch.equal(others[1], expected[1])
    assert torch.equal(images(fill(conditional, tmp_path, 7, sampling, batch_size)), expected)
    # Any selection and order of images gives the same images.
    chosen = [6, 1, 4]
    made = dict(generate_images(conditional, chosen, sampling, batch_size=batch_size))
    assert list(made) == chosen and all(torch.equal(made[i], expected[i]) for i in chosen)


class Rank:
    """State of one of several processes, run in its own thread."""

    def __init__(self, index, barrier):
        self.process_index, self.num_processes, self.is_main_process = index, barrier.parties, index == 0
        self.device, self.wait_for_everyone = torch.device("cpu"), barrier.wait


@pytest.mark.parametrize("words", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("world", [2, 5])
def test_several_processes_make_same_images_as_one(conditional, tmp_path, monkeypatch, world, words):
    sampling, barrier, made = Sampling(seed=5, num_inference_steps=4, **words), threading.Barrier(world), []
    monkeypatch.setattr(SampleFolder, "add", lambda self, indices, images, add=SampleFolder.add: (
        made.append((threading.current_thread(), indices)), add(self, indices, images)))  # fmt: skip

    def work(index):
        pipe = DDPMPipeline(copy.deepcopy(conditional.unet), copy.deepcopy(conditional.scheduler), CLASSES)
        pipe.set_progress_bar_config(disable=True)
        try:
            state = Rank(index, barrier)
            return images(fill_folder(pipe, tmp_path, 10, sampling, model="m", batch_size=2, state=state))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(world) as pool:
        actual = list(pool.map(work, range(world)))
    expected = by_hand(conditional, 10, sampling)
    assert all(torch.equal(each, expected) for each in actual)
    assert sorted((indices for _, indices in made), key=str) == [range(0, 4), range(4, 8), range(8, 10)]
    assert len({thread for thread, _ in made}) == min(world, 3)  # each process made its own part


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_all_numbers_of_steps_make_images_or_are_rejected(tiny_unet, tmp_path, name, spacing):
    # Without our checks, samplers of diffusers would raise internal errors or return NaN for some numbers of steps.
    pipe = DDPMPipeline(tiny_unet, DDPMScheduler(num_train_timesteps=20, beta_end=0.4, timestep_spacing=spacing))
    pipe.set_progress_bar_config(disable=True)
    rejected = []
    for steps in range(21):
        try:
            drawn = generate_images(pipe, [0], Sampling(0, steps or None, name), batch_size=1)
            assert next(drawn)[1].shape == (1, 8, 8)
        except ValueError as error:
            assert f"--num_inference_steps {steps}" in str(error)
            rejected.append(steps)
    # PNDM needs at least 4 steps, of length 20 // n: divisors of 20, or numbers whose first time (n - 1) (20 // n) is
    # pure noise.
    bars = torch.cumprod(1 - torch.linspace(1e-4, 0.4, 20), dim=0)
    uneven = [n for n in range(4, 21) if 20 % n and bars[(n - 1) * (20 // n)] > 1.5 * bars[-1]]
    assert rejected == ([1, 2, 3, *uneven] if name == "pndm" else [])
    assert len(uneven) > 5
    with pytest.raises(ValueError, match="--num_inference_steps 21: expected . to 20 with this model and --sched"):
        fill(pipe, tmp_path / "out", 1, Sampling(num_inference_steps=21, scheduler=name))
    assert not (tmp_path / "out").exists()


def test_samplers_without_clipping_are_rejected_if_they_amplify_errors(tiny_unet):
    # The cosine schedule ends at alpha_bar = 2.4e-9: the image is divided by 5e-5. On the digits, whose samples score a
    # Frechet distance of 0.6 to 1, euler made images of distance 22 with trailing steps.
    pipe = DDPMPipeline(tiny_unet, DDPMScheduler(beta_schedule="squaredcos_cap_v2"))
    with pytest.raises(ValueError, match="--scheduler euler --num_inference_steps 20: .* error by 15"):
        find_scheduler(pipe, "euler", 20)
    assert find_scheduler(pipe, "euler", 50).config.timestep_spacing == "leading"
    for name in ("dpmsolver++", "sde-dpmsolver++", "unipc"):
        config = find_scheduler(pipe, name, 20).config
        assert (config.timestep_spacing, config.thresholding, config.sample_max_value) == ("trailing", True, 1.0)
    unclipped = DDPMPipeline(tiny_unet, DDPMScheduler(clip_sample=False))
    assert not find_scheduler(unclipped, "dpmsolver++", 20).config.thresholding


def test_more_images_than_disk_can_store_are_rejected(pipe, tmp_path):
    with pytest.raises(ValueError, match="--num_images 1000000000000: the images need 59,605 GiB"):
        fill(pipe, tmp_path / "out", 10**12)
    assert not (tmp_path / "out").exists()


def test_pipeline_keeps_its_scheduler_if_sampling_is_stopped_early(pipe):
    own, sampling = pipe.scheduler, Sampling(num_inference_steps=2, scheduler="ddim")
    drawing = generate_images(pipe, range(4), sampling, batch_size=2)
    assert next(drawing)[0] == 0 and type(pipe.scheduler).__name__ == "DDIMScheduler"
    drawing.close()
    assert pipe.scheduler is own
    assert len(list(generate_images(pipe, range(4), sampling, batch_size=3))) == 4
    assert pipe.scheduler is own


def test_only_network_runs_in_low_precision(pipe, ten):
    seen = []
    pipe.unet.conv_out.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    sampling = Sampling(num_inference_steps=4, mixed_precision="bf16")
    actual = []
    for _, image in generate_images(pipe, range(10), sampling, batch_size=4):
        assert not torch.is_autocast_enabled("cpu")  # the caller's own computations keep their precision
        actual.append(image)
    assert set(seen) == {torch.bfloat16} and pipe.unet.dtype == torch.float32
    difference = (torch.stack(actual).float() - ten.float()).abs()
    assert 0 < difference.max() and difference.mean() < 3


def test_only_missing_or_damaged_shards_are_made(pipe, ten, tmp_path, monkeypatch):
    fill(pipe, tmp_path, 10)
    first, second, third = sorted((tmp_path / "shards").iterdir())
    kept = first.stat().st_mtime_ns
    second.unlink()
    (tmp_path / "shards" / ".000001.npy.partial").write_bytes(b"half of a sh")
    third.write_bytes(third.read_bytes()[:-1])
    made = []
    monkeypatch.setattr(SampleFolder, "add", lambda self, indices, images, add=SampleFolder.add: (
        made.append(indices), add(self, indices, images)))  # fmt: skip
    folder = fill(pipe, tmp_path, 10)
    assert made == [range(4, 8), range(8, 10)] and first.stat().st_mtime_ns == kept
    assert torch.equal(images(folder), ten)


@pytest.mark.parametrize("content", [b"", b"no array", "float", "other shape", "too many"])
def test_invalid_shards_count_as_missing(pipe, ten, tmp_path, content):
    fill(pipe, tmp_path, 4)
    path = tmp_path / "shards" / "000000.npy"
    arrays = {"float": np.zeros((4, 1, 8, 8)), "other shape": np.zeros((4, 1, 8, 9), np.uint8)}
    arrays["too many"] = np.zeros((5, 1, 8, 8), np.uint8)
    np.save(path, arrays[content]) if content in arrays else path.write_bytes(content)
    assert torch.equal(images(fill(pipe, tmp_path, 4)), ten[:4])


def test_more_images_continue_last_shard(pipe, ten, tmp_path, monkeypatch):
    fill(pipe, tmp_path, 6)
    made = []
    monkeypatch.setattr(SampleFolder, "add", lambda self, indices, images, add=SampleFolder.add: (
        made.append(indices), add(self, indices, images)))  # fmt: skip
    folder = fill(pipe, tmp_path, 10)
    assert made == [range(6, 8), range(8, 10)]
    assert torch.equal(images(folder), ten)
    assert len(fill(pipe, tmp_path, 3)) == 10  # a smaller number removes nothing


def test_kill_loses_only_current_shard(pipe, ten, tmp_path, monkeypatch):
    calls = []

    def killed(self, indices, images, add=SampleFolder.add):
        calls.append(indices)
        if len(calls) == 2:
            raise KeyboardInterrupt
        add(self, indices, images)

    monkeypatch.setattr(SampleFolder, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        fill(pipe, tmp_path, 10)
    monkeypatch.undo()
    monkeypatch.setattr(hf_ddpm.sampling.folder, "SHARD_SIZE", 4)
    assert len(SampleFolder.read(tmp_path)) == 4
    assert torch.equal(images(fill(pipe, tmp_path, 10)), ten)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"seed": 1}, "seed=1 (was 0)"),
        ({"num_inference_steps": 5}, "num_inference_steps=5 (was 4)"),
        ({"scheduler": "ddim"}, "sampler_version=2 (was None), scheduler='ddim' (was 'ddpm')"),
        (
            {"scheduler": "ddim", "eta": 0.5},
            "eta=0.5 (was 0.0), sampler_version=2 (was None), scheduler='ddim' (was 'ddpm')",
        ),
        ({"class_labels": ["1"]}, "class_labels=['1'] (was [])"),
        ({"guidance_scale": 2.0}, "guidance_scale=2.0 (was 1.0)"),
        ({"mixed_precision": "bf16"}, "mixed_precision='bf16' (was 'no'), sampler_version=2 (was None)"),
    ],
)
def test_images_of_other_settings_are_rejected(pipe, tmp_path, other, named):
    fill(pipe, tmp_path, 2)
    message = f"{tmp_path}: folder contains images sampled with other settings: {named}; choose another folder"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        fill(pipe, tmp_path, 2, Sampling(**{"num_inference_steps": 4, **other}))


def test_images_of_other_models_are_rejected_but_copies_are_not(pipe, trained, tmp_path):
    fill(pipe, tmp_path, 2)
    fill_folder(
        DDPMPipeline.from_pretrained(trained), tmp_path, 3, FOUR_STEPS, model="a copy", batch_size=1,
        state=PartialState(cpu=True),
    )  # fmt: skip
    pipe.unet.conv_out.bias.data += 1e-3
    with pytest.raises(ValueError, match=r": model_checksum='\w{64}' \(was '\w{64}'\); choose another folder$"):
        fill(pipe, tmp_path, 2)
    pipe = DDPMPipeline.from_pretrained(trained)
    pipe.scheduler.register_to_config(clip_sample_range=0.5)
    with pytest.raises(ValueError, match="model_checksum"):
        fill(pipe, tmp_path, 2)


def test_fewer_steps_use_fixed_small_unless_variance_is_learned(pipe):
    def used(own, steps, **options):
        pipe.scheduler = DDPMScheduler(num_train_timesteps=20, variance_type=own)
        return find_scheduler(pipe, "ddpm", steps, **options).variance_type

    for own in ("fixed_small", "fixed_large", "learned", "learned_range"):
        assert used(own, 20) == own and used(own, 19, variance="model") == own
        assert used(own, 19) == (own if own.startswith("learned") else "fixed_small")
    assert (
        used("fixed_large_log", 19) == "fixed_small"
        and used("fixed_small", 19, variance="fixed_large") == "fixed_large"
    )
    assert pipe.scheduler.variance_type == "fixed_small"  # the pipeline's own scheduler is unchanged
    with pytest.raises(ValueError, match="--variance fixed_small: the network learns its variance"):
        used("learned", 19, variance="fixed_small")
    with pytest.raises(
        ValueError, match="--variance model: not supported with --scheduler ddim; expected --scheduler ddpm"
    ):
        Sampling(scheduler="ddim", variance="model")
    pipe.scheduler = SCHEDULERS["ddim"][0].from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="the model's scheduler is a DDIMScheduler; expected model"):
        find_scheduler(pipe, "ddpm", 5, "fixed_small")


def test_fewer_steps_sample_with_fixed_small_and_folders_do_not_mix_variances(pipe, tmp_path):
    small, large = (
        DDPMScheduler.from_config(pipe.scheduler.config, variance_type=f"fixed_{size}") for size in ("small", "large")
    )
    pipe.scheduler = small
    expected = images(fill(pipe, tmp_path / "small", 2))
    pipe.scheduler = large
    folder = fill(pipe, tmp_path / "large", 2)
    assert torch.equal(images(folder), expected) and folder.settings["variance"] == "fixed_small"
    own = fill(pipe, tmp_path / "own", 2, replace(FOUR_STEPS, variance="model"))
    assert not torch.equal(images(own), expected)
    assert "variance" not in fill(pipe, tmp_path / "ddim", 1, replace(FOUR_STEPS, scheduler="ddim")).settings
    # Folders of earlier versions, without this setting, contain images of the model's own variance.
    assert "variance" not in json.loads((tmp_path / "own" / "sampling.json").read_text())
    with pytest.raises(ValueError, match=r": variance='fixed_small' \(was None\); choose another folder$"):
        fill(pipe, tmp_path / "own", 3)
    # A direct call of the pipeline samples with the same variance as diffusers.
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    stock = pipe(2, generators[0], 4, "pt").images
    pipe.scheduler = small
    assert not torch.equal(pipe(2, generators[1], 4, "pt").images, stock)


def test_settings_are_fixed_by_first_shard(pipe, tmp_path):
    with pytest.raises(ValueError, match="guidance_scale=2.0: the network was trained without class_dropout"):
        fill(pipe, tmp_path, 2, Sampling(num_inference_steps=4, guidance_scale=2.0))
    assert len(fill(pipe, tmp_path, 2)) == 2
    assert json.loads((tmp_path / "sampling.json").read_text())["guidance_scale"] == 1.0


def test_folders_of_unknown_origin_or_in_use_are_rejected(pipe, tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "00000.png")
    with pytest.raises(ValueError, match="contains images sampled with unknown settings; choose another folder"):
        fill(pipe, tmp_path, 1)
    (tmp_path / "00000.png").unlink()
    with exclusive(tmp_path), pytest.raises(ValueError, match="--output .*: folder is in use by another run"):
        fill(pipe, tmp_path, 1)
    fill(pipe, tmp_path, 1)
    (tmp_path / "sampling.json").write_text("{")
    with pytest.raises(ValueError, match="sampling.json is missing or damaged; choose another folder"):
        fill(pipe, tmp_path, 1)
    with pytest.raises(ValueError, match="not a folder of samples; expected sampling.json and shards"):
        open_samples(tmp_path)


def test_script_writes_png_files_or_one_array(trained, ten, tmp_path, capsys):
    main = load_script("sample").main
    words = ["--model", str(trained), "--num_inference_steps", "4", "--output", str(tmp_path)]
    main([*words, "--num_images", "5"])
    assert f"5 images: {tmp_path} (overview: {tmp_path}/grid.png)\n" in capsys.readouterr().out
    read = np.stack([np.asarray(Image.open(path)) for path in sorted(tmp_path.glob("0*.png"))])
    np.testing.assert_array_equal(read, ten[:5, 0])
    main([*words, "--num_images", "10", "--format", "npz"])
    with np.load(tmp_path / "samples.npz") as archive:
        np.testing.assert_array_equal(archive["arr_0"], ten.permute(0, 2, 3, 1))
    assert len(list(tmp_path.glob("0*.png"))) == 5
    (tmp_path / "00002.png").unlink()
    main([*words, "--num_images", "10"])
    read = np.stack([np.asarray(Image.open(path)) for path in sorted(tmp_path.glob("0*.png"))])
    np.testing.assert_array_equal(read, ten[:, 0])
    assert torch.equal(images(ImageFolder(tmp_path)), ten) and type(open_samples(tmp_path)) is SampleFolder
    with pytest.raises(ValueError, match="a folder, not a file"):
        main([*words, "--output", str(tmp_path / "grid.png")])


def test_png_files_of_other_modes_are_converted_or_rejected(tmp_path):
    Image.new("P", (4, 4)).save(tmp_path / "0.png", transparency=0)  # black and fully transparent
    (palette,) = images(ImageFolder(tmp_path))
    assert palette.shape == (3, 4, 4) and (palette == 255).all()
    (palette,) = images(open_samples(tmp_path, "#0102ff"))
    assert palette[:, 0, 0].tolist() == [1, 2, 255]
    Image.fromarray(np.full((4, 4), 300, np.uint16)).save(tmp_path / "0.png")
    with pytest.raises(ValueError, match=r"0\.png: image is unusable: image has more than 8 bits per"):
        ImageFolder(tmp_path)


@pytest.mark.slow
def test_sampling_resumes_after_signal(trained, tmp_path):
    words = ["--model", str(trained), "--output", str(tmp_path), "--num_images", "1500", "--num_inference_steps", "20"]
    command = [sys.executable, str(ROOT / "scripts" / "sample.py"), *words, "--batch_size", "256"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    while run.poll() is None and not (tmp_path / "shards" / "000000.npy").exists():
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    _, output = run.communicate()
    assert run.returncode == 143 and output.splitlines()[-1] == "sample.py: stopped by SIGTERM"
    assert "Trace" not in output
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").glob("0*.npy")}
    assert 1 <= len(shards) < 6
    again = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert again.returncode == 0, again.stderr
    assert all(path.stat().st_mtime_ns == time for path, time in shards.items())
    assert len(list(tmp_path.glob("0*.png"))) == 1500


@pytest.mark.slow
def test_two_launched_processes_write_same_images(trained, tmp_path):
    words = ["--model", str(trained), "--num_images", "300", "--num_inference_steps", "4", "--format", "npz"]
    script = str(ROOT / "scripts" / "sample.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    launchers = {"a": [], "b": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]}
    for name, launcher in launchers.items():
        command = [sys.executable, *launcher, script, *words, "--output", str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "a" / "samples.npz").read_bytes() == (tmp_path / "b" / "samples.npz").read_bytes()


def test_compiled_network_runs_with_one_batch_size(conditional):
    sampling, sizes = Sampling(0, 2, mixed_precision="no"), []
    expected = list(generate_images(conditional, range(10), sampling, batch_size=4))
    call = conditional.unet._call_impl

    def compiled(sample, *args, **kwargs):
        sizes.append(len(sample))
        return call(sample, *args, **kwargs)

    conditional.unet._compiled_call_impl = compiled
    for ids in (range(10), range(3)):  # two batches and a remainder; then a single smaller batch
        images = list(generate_images(conditional, ids, sampling, batch_size=4))
        assert [index for index, _ in images] == list(ids)
        differences = [(image.int() - expected[i][1].int()).abs().max() for i, (_, image) in enumerate(images)]
        assert max(differences) <= 1
    assert set(sizes) == {4}


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="nothing compiles here")
def test_weights_are_constants_after_compiling_for_sampling(tiny_unet):
    from torch._inductor import config

    unet, plain = tiny_unet.eval(), copy.deepcopy(tiny_unet).eval()
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([5])
    with config.patch(freezing=False), torch.no_grad():  # restored afterwards
        compile_for_sampling(unet)
        before = unet(x, t).sample
        torch.testing.assert_close(before, plain(x, t).sample, rtol=0, atol=1e-5)
        unet.conv_out.weight.zero_()
        assert torch.equal(unet(x, t).sample, before)
    torch.compiler.reset()


def choose(monkeypatch, precision):
    """Set the precision that `auto` chooses; return a list that gets an entry per choice."""
    choices = []
    monkeypatch.setattr("hf_ddpm.sampling.generate.choose_precision", lambda network, shape, batch, compiled: (
        choices.append((shape, batch)), Choice(precision, f"precision {precision}: chosen"))[1])  # fmt: skip
    return choices


def stored(folder):
    return json.loads((folder / "sampling.json").read_text())["mixed_precision"]


@pytest.mark.parametrize(("first", "second"), [("bf16", "no"), ("no", "bf16")])
def test_folder_keeps_precision_chosen_by_auto(trained, tmp_path, monkeypatch, capsys, first, second):
    choices = choose(monkeypatch, first)
    words = ["--model", str(trained), "--num_inference_steps", "2", "--batch_size", "3"]
    sample = load_script("sample").main
    sample([*words, "--output", str(tmp_path / "auto"), "--num_images", "6"])
    assert choices == [((1, 8, 8), 3)] and stored(tmp_path / "auto") == first
    assert capsys.readouterr().out.startswith(f"precision {first}: chosen\n6 images: ")
    choices = choose(monkeypatch, second)
    sample([*words, "--output", str(tmp_path / "auto"), "--num_images", "9"])
    assert choices == [] and stored(tmp_path / "auto") == first
    line = f"precision {first.replace('no', 'float32')}, like the existing images in {tmp_path / 'auto'}\n"
    assert capsys.readouterr().out.startswith(f"{line}9 images: ")
    sample([*words, "--output", str(tmp_path / "given"), "--num_images", "9", "--mixed_precision", first])
    actual, expected = (images(SampleFolder.read(tmp_path / name)) for name in ("auto", "given"))
    assert torch.equal(actual, expected)
    with pytest.raises(ValueError, match=f"mixed_precision='{second}' .was '{first}'"):
        sample([*words, "--output", str(tmp_path / "auto"), "--num_images", "9", "--mixed_precision", second])


def test_auto_chooses_before_network_is_compiled(trained, tmp_path, monkeypatch):
    order = []
    choices = choose(monkeypatch, "no")
    monkeypatch.setattr("hf_ddpm.sampling.generate.compile_for_sampling", lambda unet: order.append(len(choices)))
    sampling = Sampling(num_inference_steps=2)
    hf_ddpm.sample_images(trained, tmp_path, 2, sampling, compile=True)
    assert order == [1] and sampling.mixed_precision == "auto"


@pytest.mark.parametrize("compiled", [False, True])
def test_weights_are_cast_once_for_all_images(pipe, tmp_path, monkeypatch, compiled):
    """The original network is restored, compiled or not, also after an error."""
    casts, compilations, seen = [], [], []

    def compile_copy(unet):
        compilations.append(unet.dtype)
        unet._compiled_call_impl = unet._call_impl

    monkeypatch.setattr("hf_ddpm.sampling.generate.compile_for_sampling", compile_copy)
    monkeypatch.setattr(
        "hf_ddpm.sampling.generate.cast_copy", lambda *args: (casts.append(args[1]), cast_copy(*args))[1]
    )
    own, weights = pipe.unet, copy.deepcopy(pipe.unet.state_dict())
    if compiled:
        own._compiled_call_impl = own._call_impl
    handle = own.conv_in.register_forward_hook(lambda module, args, out: seen.append((out.dtype, module.weight.dtype)))
    sampling = Sampling(0, 2, mixed_precision="bf16")
    folder = fill(pipe, tmp_path, 10, sampling, batch_size=2)  # three shards
    assert casts == ["bf16"] and set(seen) == {(torch.bfloat16, torch.bfloat16)}
    assert compilations == [torch.bfloat16] * compiled
    assert pipe.unet is own and all(torch.equal(value, weights[name]) for name, value in own.state_dict().items())
    assert folder.settings["model_checksum"] == model_checksum(pipe)
    handle.remove()
    pipe.unet.register_forward_hook(lambda *args: pytest.fail("stopped"))
    with pytest.raises(pytest.fail.Exception):
        list(generate_images(pipe, range(2), sampling, batch_size=2))
    assert pipe.unet is own


def test_generate_images_uses_precision_chosen_by_auto(pipe, monkeypatch):
    choices = choose(monkeypatch, "bf16")
    actual, expected = (
        [image for _, image in generate_images(pipe, range(4), Sampling(0, 2, mixed_precision=name), batch_size=4)]
        for name in ("auto", "bf16")
    )
    assert choices == [((1, 8, 8), 4)] and torch.equal(torch.stack(actual), torch.stack(expected))
