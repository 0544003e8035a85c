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
from hf_ddpm.sampling.folder import PictureFolder, SampleFolder, open_samples
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
    """Ten images, made without any folder."""
    pipe = DDPMPipeline.from_pretrained(trained)
    pipe.set_progress_bar_config(disable=True)
    made = generate_images(pipe, range(10), Sampling(0, 4), batch_size=10)
    return torch.stack([image for _, image in made])


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_folder_holds_the_images_of_the_row_for_any_batch_size(pipe, ten, tmp_path, batch_size):
    folder = fill(pipe, tmp_path, 10, batch_size=batch_size)
    assert len(folder) == 10 and torch.equal(images(folder), ten)
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == ["000000.npy", "000001.npy", "000002.npy"]
    assert [len(np.load(path)) for path in sorted((tmp_path / "shards").iterdir())] == [4, 4, 2]


@pytest.fixture(scope="module")
def conditional():
    """A network of ten classes and of none of them: what it says depends on the class as on the image."""
    torch.manual_seed(0)
    unet = UNet2DModel(**TINY_UNET, num_class_embeds=11).eval()
    unet.class_embedding.weight.data *= 5
    pipe = DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=20, beta_end=0.4), CLASSES)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# Everything that must not depend on batches and processes, with and without classes.
KINDS = {
    "no class": {},
    "classes": {"class_labels": ["3", "7", "1"]},
    "guidance": {"class_labels": ["3", "7"], "guidance_scale": 3.0},
    "guided ddim": {"class_labels": ["3", "7", "1"], "guidance_scale": 2.0, "scheduler": "ddim", "eta": 0.5},
}


def by_hand(pipe, count, sampling):
    """Returns images one by one, each with the class of its number."""
    labels = sampling.class_labels
    one_by_one = []
    for i in range(count):
        alone = replace(sampling, class_labels=[labels[i % len(labels)]] if labels else [])
        one_by_one += [image for _, image in generate_images(pipe, [i], alone, batch_size=1)]
    return torch.stack(one_by_one)


@pytest.mark.parametrize("words", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_image_i_has_its_noise_and_its_class_in_any_batch(conditional, tmp_path, words, batch_size):
    sampling = Sampling(seed=5, num_inference_steps=4, **words)
    expected = by_hand(conditional, 7, sampling)
    assert len({image.numpy().tobytes() for image in expected}) == 7
    if sampling.class_labels:
        others = by_hand(conditional, 2, replace(sampling, class_labels=["7", "3"]))
        assert not torch.equal(others[0], expected[0]) and not torch.equal(others[1], expected[1])
    assert torch.equal(images(fill(conditional, tmp_path, 7, sampling, batch_size)), expected)
    # Nor does it matter which images are asked for, and in which order.
    chosen = [6, 1, 4]
    made = dict(generate_images(conditional, chosen, sampling, batch_size=batch_size))
    assert list(made) == chosen and all(torch.equal(made[i], expected[i]) for i in chosen)


class Rank:
    """A process among several, in a thread of its own."""

    def __init__(self, index, barrier):
        self.process_index, self.num_processes, self.is_main_process = index, barrier.parties, index == 0
        self.device, self.wait_for_everyone = torch.device("cpu"), barrier.wait


@pytest.mark.parametrize("words", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("world", [2, 5])
def test_processes_share_the_work_and_make_the_images_of_one(conditional, tmp_path, monkeypatch, world, words):
    sampling, barrier, made = Sampling(seed=5, num_inference_steps=4, **words), threading.Barrier(world), []
    monkeypatch.setattr(SampleFolder, "add", lambda self, numbers, images, add=SampleFolder.add: (
        made.append((threading.current_thread(), numbers)), add(self, numbers, images)))  # fmt: skip

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
        found = list(pool.map(work, range(world)))
    expected = by_hand(conditional, 10, sampling)
    assert all(torch.equal(each, expected) for each in found)
    assert sorted((numbers for _, numbers in made), key=str) == [range(0, 4), range(4, 8), range(8, 10)]
    assert len({thread for thread, _ in made}) == min(world, 3)  # nobody made what another one was to make


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_all_numbers_of_steps_make_images_or_are_refused(tiny_unet, tmp_path, name, spacing):
    # Those of diffusers that are not allowed would be errors of its insides, or values that are not finite.
    pipe = DDPMPipeline(tiny_unet, DDPMScheduler(num_train_timesteps=20, beta_end=0.4, timestep_spacing=spacing))
    pipe.set_progress_bar_config(disable=True)
    refused = []
    for steps in range(21):
        try:
            drawn = generate_images(pipe, [0], Sampling(0, steps or None, name), batch_size=1)
            assert next(drawn)[1].shape == (1, 8, 8)
        except ValueError as error:
            assert f"num_inference_steps={steps}" in str(error)
            refused.append(steps)
    # PNDM takes 4 steps at least, of 20 // n: numbers that divide 20, or that start from noise at (n - 1) (20 // n).
    bars = torch.cumprod(1 - torch.linspace(1e-4, 0.4, 20), dim=0)
    uneven = [n for n in range(4, 21) if 20 % n and bars[(n - 1) * (20 // n)] > 1.5 * bars[-1]]
    assert refused == ([1, 2, 3, *uneven] if name == "pndm" else [])
    assert len(uneven) > 5
    with pytest.raises(ValueError, match="num_inference_steps=21 is not allowed: . to 20 with this model and sched"):
        fill(pipe, tmp_path / "out", 1, Sampling(num_inference_steps=21, scheduler=name))
    assert not (tmp_path / "out").exists()


def test_samplers_that_do_not_clip_are_refused_where_they_would_blow_up_errors(tiny_unet):
    # The cosine schedule ends at alpha_bar = 2.4e-9: the image is divided by 5e-5. On the digits, whose samples score a
    # Frechet distance of 0.6 to 1, euler made images of distance 22 with trailing steps.
    pipe = DDPMPipeline(tiny_unet, DDPMScheduler(beta_schedule="squaredcos_cap_v2"))
    with pytest.raises(ValueError, match="scheduler=euler, num_inference_steps=20: .* error by 15"):
        find_scheduler(pipe, "euler", 20)
    assert find_scheduler(pipe, "euler", 50).config.timestep_spacing == "leading"
    for name in ("dpmsolver++", "sde-dpmsolver++", "unipc"):
        config = find_scheduler(pipe, name, 20).config
        assert (config.timestep_spacing, config.thresholding, config.sample_max_value) == ("trailing", True, 1.0)
    unclipped = DDPMPipeline(tiny_unet, DDPMScheduler(clip_sample=False))
    assert not find_scheduler(unclipped, "dpmsolver++", 20).config.thresholding


def test_more_images_than_the_disk_holds_are_refused(pipe, tmp_path):
    with pytest.raises(ValueError, match="num_images=1000000000000 is not allowed: they take 59,605 GiB, and the disk"):
        fill(pipe, tmp_path / "out", 10**12)
    assert not (tmp_path / "out").exists()


def test_a_pipeline_keeps_its_scheduler_even_if_drawing_is_left(pipe):
    own, sampling = pipe.scheduler, Sampling(num_inference_steps=2, scheduler="ddim")
    drawing = generate_images(pipe, range(4), sampling, batch_size=2)
    assert next(drawing)[0] == 0 and type(pipe.scheduler).__name__ == "DDIMScheduler"
    drawing.close()
    assert pipe.scheduler is own
    assert len(list(generate_images(pipe, range(4), sampling, batch_size=3))) == 4
    assert pipe.scheduler is own


def test_low_precision_is_for_the_network_alone(pipe, ten):
    seen = []
    pipe.unet.conv_out.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    sampling = Sampling(num_inference_steps=4, mixed_precision="bf16")
    found = []
    for _, image in generate_images(pipe, range(10), sampling, batch_size=4):
        assert not torch.is_autocast_enabled("cpu")  # whoever takes the images does not compute in it
        found.append(image)
    assert set(seen) == {torch.bfloat16} and pipe.unet.dtype == torch.float32
    difference = (torch.stack(found).float() - ten.float()).abs()
    assert 0 < difference.max() and difference.mean() < 3


def test_only_what_is_missing_or_damaged_is_made(pipe, ten, tmp_path, monkeypatch):
    fill(pipe, tmp_path, 10)
    first, second, third = sorted((tmp_path / "shards").iterdir())
    kept = first.stat().st_mtime_ns
    second.unlink()
    (tmp_path / "shards" / ".000001.npy.partial").write_bytes(b"half of a sh")
    third.write_bytes(third.read_bytes()[:-1])
    made = []
    monkeypatch.setattr(SampleFolder, "add", lambda self, numbers, images, add=SampleFolder.add: (
        made.append(numbers), add(self, numbers, images)))  # fmt: skip
    folder = fill(pipe, tmp_path, 10)
    assert made == [range(4, 8), range(8, 10)] and first.stat().st_mtime_ns == kept
    assert torch.equal(images(folder), ten)


@pytest.mark.parametrize("content", [b"", b"no array", "float", "other shape", "too many"])
def test_what_is_no_shard_of_the_folder_counts_as_missing(pipe, ten, tmp_path, content):
    fill(pipe, tmp_path, 4)
    path = tmp_path / "shards" / "000000.npy"
    arrays = {"float": np.zeros((4, 1, 8, 8)), "other shape": np.zeros((4, 1, 8, 9), np.uint8)}
    arrays["too many"] = np.zeros((5, 1, 8, 8), np.uint8)
    np.save(path, arrays[content]) if content in arrays else path.write_bytes(content)
    assert torch.equal(images(fill(pipe, tmp_path, 4)), ten[:4])


def test_more_images_continue_the_last_shard(pipe, ten, tmp_path, monkeypatch):
    fill(pipe, tmp_path, 6)
    made = []
    monkeypatch.setattr(SampleFolder, "add", lambda self, numbers, images, add=SampleFolder.add: (
        made.append(numbers), add(self, numbers, images)))  # fmt: skip
    folder = fill(pipe, tmp_path, 10)
    assert made == [range(6, 8), range(8, 10)]
    assert torch.equal(images(folder), ten)
    assert len(fill(pipe, tmp_path, 3)) == 10  # fewer take nothing away


def test_a_kill_within_a_shard_costs_that_shard_alone(pipe, ten, tmp_path, monkeypatch):
    calls = []

    def killed(self, numbers, images, add=SampleFolder.add):
        calls.append(numbers)
        if len(calls) == 2:
            raise KeyboardInterrupt
        add(self, numbers, images)

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
def test_images_of_other_settings_are_refused_by_name(pipe, tmp_path, other, named):
    fill(pipe, tmp_path, 2)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} holds images of other settings")) as caught:
        fill(pipe, tmp_path, 2, Sampling(**{"num_inference_steps": 4, **other}))
    assert str(caught.value).endswith(f": {named}")


def test_images_of_another_model_are_refused_and_of_its_copy_are_not(pipe, trained, tmp_path):
    fill(pipe, tmp_path, 2)
    fill_folder(
        DDPMPipeline.from_pretrained(trained), tmp_path, 3, FOUR_STEPS, model="a copy", batch_size=1,
        state=PartialState(cpu=True),
    )  # fmt: skip
    pipe.unet.conv_out.bias.data += 1e-3
    with pytest.raises(ValueError, match=r"model_checksum='\w{64}' \(was '\w{64}'\)$"):
        fill(pipe, tmp_path, 2)
    pipe = DDPMPipeline.from_pretrained(trained)
    pipe.scheduler.register_to_config(clip_sample_range=0.5)
    with pytest.raises(ValueError, match="model_checksum"):
        fill(pipe, tmp_path, 2)


def test_fewer_steps_take_the_small_variance_unless_the_model_has_learned_it(pipe):
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
    assert pipe.scheduler.variance_type == "fixed_small"  # the pipeline's own stays
    with pytest.raises(ValueError, match="variance='fixed_small' is not allowed: the network has learned its own"):
        used("learned", 19, variance="fixed_small")
    with pytest.raises(ValueError, match="variance='model' is not allowed: expected no variance with scheduler=ddim"):
        Sampling(scheduler="ddim", variance="model")
    pipe.scheduler = SCHEDULERS["ddim"][0].from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="the scheduler of the model is a DDIMScheduler; expected model"):
        find_scheduler(pipe, "ddpm", 5, "fixed_small")


def test_images_of_few_steps_are_those_of_the_small_variance_and_folders_mix_no_two(pipe, tmp_path):
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
    # Folders of earlier versions, without the setting, hold images of the model's own variance.
    assert "variance" not in json.loads((tmp_path / "own" / "sampling.json").read_text())
    with pytest.raises(ValueError, match=r": variance='fixed_small' \(was None\)$"):
        fill(pipe, tmp_path / "own", 3)
    # A stock caller gets what diffusers would sample.
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    stock = pipe(2, generators[0], 4, "pt").images
    pipe.scheduler = small
    assert not torch.equal(pipe(2, generators[1], 4, "pt").images, stock)


def test_settings_bind_only_with_the_first_shard(pipe, tmp_path):
    with pytest.raises(ValueError, match="guidance_scale=2.0: the network was trained without class_dropout"):
        fill(pipe, tmp_path, 2, Sampling(num_inference_steps=4, guidance_scale=2.0))
    assert len(fill(pipe, tmp_path, 2)) == 2
    assert json.loads((tmp_path / "sampling.json").read_text())["guidance_scale"] == 1.0


def test_folders_of_unknown_origin_or_in_use_are_refused(pipe, tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "00000.png")
    with pytest.raises(ValueError, match="holds images of unknown settings"):
        fill(pipe, tmp_path, 1)
    (tmp_path / "00000.png").unlink()
    with exclusive(tmp_path), pytest.raises(ValueError, match="output=.* is in use by another run"):
        fill(pipe, tmp_path, 1)
    fill(pipe, tmp_path, 1)
    (tmp_path / "sampling.json").write_text("{")
    with pytest.raises(ValueError, match="holds shards but no sampling.json that can be read"):
        fill(pipe, tmp_path, 1)
    with pytest.raises(ValueError, match="holds no samples"):
        open_samples(tmp_path)


def test_the_script_writes_pictures_or_one_array(trained, ten, tmp_path):
    main = load_script("sample").main
    words = ["--model", str(trained), "--num_inference_steps", "4", "--output", str(tmp_path)]
    main([*words, "--num_images", "5"])
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
    assert torch.equal(images(PictureFolder(tmp_path)), ten) and type(open_samples(tmp_path)) is SampleFolder
    with pytest.raises(ValueError, match="it is a file, a folder is wanted"):
        main([*words, "--output", str(tmp_path / "grid.png")])


def test_pictures_of_others_are_taken_as_they_look_or_refused(tmp_path):
    Image.new("P", (4, 4)).save(tmp_path / "0.png", transparency=0)  # black, and transparent all over
    (palette,) = images(PictureFolder(tmp_path))
    assert palette.shape == (3, 4, 4) and (palette == 255).all()
    (palette,) = images(open_samples(tmp_path, "#0102ff"))
    assert palette[:, 0, 0].tolist() == [1, 2, 255]
    Image.fromarray(np.full((4, 4), 300, np.uint16)).save(tmp_path / "0.png")
    with pytest.raises(ValueError, match=r"0\.png cannot be used: it has more than 8 bits a channel"):
        PictureFolder(tmp_path)


@pytest.mark.slow
def test_a_signal_ends_sampling_with_one_line_and_the_same_command_goes_on(trained, tmp_path):
    words = ["--model", str(trained), "--output", str(tmp_path), "--num_images", "1500", "--num_inference_steps", "20"]
    command = [sys.executable, str(ROOT / "scripts" / "sample.py"), *words, "--batch_size", "256"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    while run.poll() is None and not (tmp_path / "shards" / "000000.npy").exists():
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate()
    assert run.returncode == 143 and said.splitlines()[-1] == "sample.py: stopped by SIGTERM" and "Trace" not in said
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").glob("0*.npy")}
    assert 1 <= len(shards) < 6
    again = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert again.returncode == 0, again.stderr
    assert all(path.stat().st_mtime_ns == time for path, time in shards.items())
    assert len(list(tmp_path.glob("0*.png"))) == 1500


@pytest.mark.slow
def test_two_launched_processes_make_the_same_images(trained, tmp_path):
    words = ["--model", str(trained), "--num_images", "300", "--num_inference_steps", "4", "--format", "npz"]
    script = str(ROOT / "scripts" / "sample.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    launchers = {"a": [], "b": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]}
    for name, launcher in launchers.items():
        command = [sys.executable, *launcher, script, *words, "--output", str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "a" / "samples.npz").read_bytes() == (tmp_path / "b" / "samples.npz").read_bytes()


def test_a_compiled_network_sees_one_batch_size(conditional):
    sampling, sizes = Sampling(0, 2, mixed_precision="no"), []
    expected = list(generate_images(conditional, range(10), sampling, batch_size=4))
    call = conditional.unet._call_impl

    def compiled(sample, *args, **kwargs):
        sizes.append(len(sample))
        return call(sample, *args, **kwargs)

    conditional.unet._compiled_call_impl = compiled
    for ids in (range(10), range(3)):  # two parts and a remainder; a smaller part of a folder later
        images = list(generate_images(conditional, ids, sampling, batch_size=4))
        assert [number for number, _ in images] == list(ids)
        differences = [(image.int() - expected[i][1].int()).abs().max() for i, (_, image) in enumerate(images)]
        assert max(differences) <= 1
    assert set(sizes) == {4}


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="nothing compiles here")
def test_weights_are_constants_of_a_network_that_is_compiled_for_sampling(tiny_unet):
    from torch._inductor import config

    unet, plain = tiny_unet.eval(), copy.deepcopy(tiny_unet).eval()
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([5])
    with config.patch(freezing=False), torch.no_grad():  # as it is again afterwards
        compile_for_sampling(unet)
        before = unet(x, t).sample
        torch.testing.assert_close(before, plain(x, t).sample, rtol=0, atol=1e-5)
        unet.conv_out.weight.zero_()
        assert torch.equal(unet(x, t).sample, before)
    torch.compiler.reset()


def choose(monkeypatch, precision):
    """Sets what `auto` stands for; returns a list that gets an entry per choice."""
    asked = []
    monkeypatch.setattr("hf_ddpm.sampling.generate.choose_precision", lambda network, shape, batch, compiled: (
        asked.append((shape, batch)), Choice(precision, f"precision {precision}: chosen"))[1])  # fmt: skip
    return asked


def stored(folder):
    return json.loads((folder / "sampling.json").read_text())["mixed_precision"]


@pytest.mark.parametrize(("first", "second"), [("bf16", "no"), ("no", "bf16")])
def test_a_folder_keeps_the_precision_that_auto_stood_for(trained, tmp_path, monkeypatch, capsys, first, second):
    asked = choose(monkeypatch, first)
    words = ["--model", str(trained), "--num_inference_steps", "2", "--batch_size", "3"]
    sample = load_script("sample").main
    sample([*words, "--output", str(tmp_path / "auto"), "--num_images", "6"])
    assert asked == [((1, 8, 8), 3)] and stored(tmp_path / "auto") == first
    assert capsys.readouterr().out == f"precision {first}: chosen\n"
    asked = choose(monkeypatch, second)
    sample([*words, "--output", str(tmp_path / "auto"), "--num_images", "9"])
    assert asked == [] and stored(tmp_path / "auto") == first
    line = f"precision {first.replace('no', 'float32')}: that of the images in {tmp_path / 'auto'}\n"
    assert capsys.readouterr().out == line
    sample([*words, "--output", str(tmp_path / "given"), "--num_images", "9", "--mixed_precision", first])
    found, expected = (images(SampleFolder.read(tmp_path / name)) for name in ("auto", "given"))
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match=f"mixed_precision='{second}' .was '{first}'"):
        sample([*words, "--output", str(tmp_path / "auto"), "--num_images", "9", "--mixed_precision", second])


def test_auto_is_chosen_before_the_network_is_compiled(trained, tmp_path, monkeypatch):
    order = []
    asked = choose(monkeypatch, "no")
    monkeypatch.setattr("hf_ddpm.sampling.generate.compile_for_sampling", lambda unet: order.append(len(asked)))
    sampling = Sampling(num_inference_steps=2)
    hf_ddpm.sample_images(trained, tmp_path, 2, sampling, compile=True)
    assert order == [1] and sampling.mixed_precision == "auto"


@pytest.mark.parametrize("compiled", [False, True])
def test_weights_are_cast_once_for_all_images(pipe, tmp_path, monkeypatch, compiled):
    """And the network stays as it was, compiled or not, in whatever way the sampling ends."""
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


def test_images_without_a_folder_are_of_the_precision_that_auto_stands_for(pipe, monkeypatch):
    asked = choose(monkeypatch, "bf16")
    found, expected = (
        [image for _, image in generate_images(pipe, range(4), Sampling(0, 2, mixed_precision=name), batch_size=4)]
        for name in ("auto", "bf16")
    )
    assert asked == [((1, 8, 8), 4)] and torch.equal(torch.stack(found), torch.stack(expected))
