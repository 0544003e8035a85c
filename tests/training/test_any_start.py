"""Runs on different data and from existing models: streams, bad and 16-bit images, shapes, classes, fine-tuning."""

import json
import os
import signal
import sys

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensor

from hf_ddpm import DDPMPipeline, UNet2DModel
from hf_ddpm.config import DataConfig
from hf_ddpm.data.batches import batch_indices
from hf_ddpm.data.sources import open_split
from hf_ddpm.data.store import load_images
from hf_ddpm.images import to_signed
from hf_ddpm.training.randomness import draw
from tests.conftest import load_script
from tests.data.files import numbered, shards
from tests.training.test_checkpoints import assert_same_run, end, losses, newest, start, wait_for_step


def test_streamed_run_resumes_with_identical_results(run_training, tmp_path):
    data = shards(tmp_path / "data", [numbered(i) for i in range(45)])
    words = ["--dataset", str(data), "--streaming", "--levels", "256", "--log_steps", "1", "--checkpointing_steps", "4"]
    run_training(tmp_path / "whole", *words, "--max_train_steps", "12")  # more than two epochs
    run_training(tmp_path / "parts", *words, "--max_train_steps", "5")
    run_training(tmp_path / "parts", *words, "--max_train_steps", "12")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_bad_images_are_counted_listed_and_skipped(run_training, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for number in range(9):
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(tmp_path / "images" / f"{number}.png")
    (tmp_path / "images" / "bad.png").write_bytes(b"no picture")
    run_training(tmp_path / "run", "--dataset", str(tmp_path / "images"), "--max_train_steps", "2", "--skip_bad_images")
    output = capsys.readouterr().out
    assert "9 images, " in output and "unused images and other files: 1; see" in output
    (line,) = (tmp_path / "run" / "bad_images.jsonl").read_text().splitlines()
    assert json.loads(line)["file"].endswith("bad.png")


def test_16_bit_images_keep_their_depth(run_training, tmp_path, monkeypatch):
    # Two values that differ by 1/65535 and would be equal in 8 bits.
    (tmp_path / "images").mkdir()
    for number, value in enumerate([1000, 1001]):
        Image.fromarray(np.full((8, 8), value, np.uint16)).save(tmp_path / "images" / f"{number}.png")
    seen = set()

    def note(pixels, levels):
        seen.update(to_signed(pixels, levels).unique().tolist())
        return to_signed(pixels, levels)

    monkeypatch.setattr("hf_ddpm.training.loop.to_signed", note)
    run_training(tmp_path / "run", "--dataset", str(tmp_path / "images"), "--max_train_steps", "1", "--levels", "65536")
    assert sorted(seen) == pytest.approx([2 * 1000 / 65535 - 1, 2 * 1001 / 65535 - 1], abs=1e-7)


def test_images_may_be_rectangular(run_training, tmp_path):
    run_training(tmp_path, "--resolution", "8", "4", "--max_train_steps", "2")
    pipe = DDPMPipeline.from_pretrained(tmp_path)
    assert pipe(batch_size=2, num_inference_steps=2, output_type="pt").images.shape == (2, 1, 8, 4)


@pytest.fixture(scope="module")
def conditional(run_training, tmp_path_factory):
    folder = tmp_path_factory.mktemp("conditional")
    run_training(folder, "--class_column", "auto", "--max_train_steps", "3")
    return folder


def test_class_dropout_replaces_labels_by_null_class(run_training, tmp_path, monkeypatch):
    seen = []
    forward = UNet2DModel.forward

    def note(self, sample, timestep, class_labels=None, return_dict=True):
        if self.training and not isinstance(sample, FakeTensor):  # fake tensors only count memory
            seen.append(class_labels)
        return forward(self, sample, timestep, class_labels, return_dict)

    monkeypatch.setattr(UNet2DModel, "forward", note)
    run_training(tmp_path, "--class_column", "label", "--class_dropout", "0.25", "--max_train_steps", "40")
    labels = torch.cat(seen)
    # 320 images, a quarter without a class, the others with the class frequencies of the data: within 5 deviations.
    assert abs((labels == 10).sum() - 80) < 5 * 60**0.5
    hidden = torch.cat([draw(0, step, range(8), (1, 8, 8), 1000, "cpu").hide < 0.25 for step in range(40)])
    assert torch.equal(labels == 10, hidden)
    share = np.bincount(open_split(DataConfig("digits"))[0]["label"], minlength=10) / 898
    actual = torch.bincount(labels[labels < 10], minlength=10) / (labels < 10).sum()
    assert np.abs(actual.numpy() - share).max() < 5 * (0.1 * 0.9 / 240) ** 0.5


def test_conditional_model_is_sampled_by_class_name(conditional, tmp_path):
    pipe = DDPMPipeline.from_pretrained(conditional)
    assert pipe.class_names == [str(digit) for digit in range(10)] and pipe.null_class == 10
    assert type(diffusers.DDPMPipeline.from_pretrained(conditional).unet) is diffusers.UNet2DModel
    sample = load_script("sample").main
    common = ["--model", str(conditional), "--num_inference_steps", "2", "--num_images", "3"]
    for name, words in {
        "name": "--class_labels 3 7",
        "none": "",
        "guided": "--class_labels 3 7 --guidance_scale 3",
    }.items():
        sample([*common, "--output", str(tmp_path / name), *words.split()])
    pictures = {name: (tmp_path / name / "00000.png").read_bytes() for name in ("name", "none", "guided")}
    assert len(set(pictures.values())) == 3
    with pytest.raises(ValueError, match="class_labels: unknown class 'cat'; expected one of"):
        sample([*common, "--output", str(tmp_path / "x"), "--class_labels", "cat"])


def test_likelihood_bound_of_conditional_model_uses_classes(conditional, tmp_path, monkeypatch):
    seen, forward = [], UNet2DModel.forward

    def note(self, sample, timestep, class_labels=None, return_dict=True):
        seen.append((sample, timestep.expand(len(sample)), class_labels.expand(len(sample))))
        return forward(self, sample, timestep, class_labels, return_dict)

    monkeypatch.setattr(UNet2DModel, "forward", note)
    evaluate = load_script("evaluate").main
    common = ["--model", str(conditional), "--dataset", "digits", "--num_images", "40", "--steps_per_image", "5"]
    images = to_signed(
        load_images(DataConfig("digits", split="test", resolution=[8], channels=1))[torch.arange(899)], 17
    )
    classes = torch.tensor(open_split(DataConfig("digits", split="test"))[0]["label"])
    bounds = {}
    for name, words in {"classes": ["--class_column", "label"], "none": []}.items():
        seen.clear()
        evaluate([*common, *words, "--output", str(tmp_path / f"{name}.json")])
        bounds[name] = json.loads((tmp_path / f"{name}.json").read_text())["nll"]["total_bpd"]
        samples, t, labels = map(torch.cat, zip(*seen, strict=True))
        if name == "none":
            assert set(labels.tolist()) == {10}
            continue
        # At t = 0 there is little noise: the nearest image is the one that x_t was made from.
        nearest = torch.cdist(samples[t == 0].flatten(1), images.flatten(1)).argmin(dim=1)
        assert len(nearest.unique()) == 40 and torch.equal(labels[t == 0], classes[nearest])
        assert torch.equal(torch.bincount(labels), 5 * torch.bincount(classes[nearest]))
    assert bounds["classes"] != bounds["none"] and all(np.isfinite(value) for value in bounds.values())


def test_guidance_needs_network_with_null_class(run_training, tmp_path):
    run_training(tmp_path, "--class_column", "label", "--class_dropout", "0", "--max_train_steps", "2")
    pipe = DDPMPipeline.from_pretrained(tmp_path)
    assert pipe.null_class is None and pipe.unet.config.num_class_embeds == 10
    with pytest.raises(ValueError, match="guidance_scale=2.0: the network was trained without class_dropout; expected"):
        pipe(class_labels=[3], guidance_scale=2.0)
    with pytest.raises(ValueError, match="class_labels are missing: expected 1 of"):
        pipe()


@pytest.fixture(scope="module")
def learned(run_training, tmp_path_factory):
    """Folder with a partly trained model (`ours`), and the same model saved by diffusers (`stock`)."""
    folder = tmp_path_factory.mktemp("learned")
    words = ["--learning_rate", "3e-3", "--ema_decay", "0.5", "--prediction_type", "v_prediction"]
    run_training(folder / "ours", "--max_train_steps", "80", *words)
    diffusers.DDPMPipeline.from_pretrained(folder / "ours").save_pretrained(folder / "stock")
    return folder


@pytest.mark.parametrize("kind", ["ours", "stock"])
def test_fine_tuning_starts_from_loss_of_model(run_training, learned, tmp_path, kind):
    words = ["--max_train_steps", "2", "--log_steps", "1", "--warmup_steps", "0", "--dropout", "0"]
    run_training(tmp_path / "new", *words, "--prediction_type", "v_prediction")
    run_training(tmp_path / "tuned", *words, "--init_from", str(learned / kind))
    average = DDPMPipeline.from_pretrained(learned / "ours")
    images = load_images(DataConfig("digits", resolution=[8], channels=1))
    draws = draw(0, 0, range(8), (1, 8, 8), 1000, "cpu")
    x_start = to_signed(images[batch_indices(0, 0, 8, 898)], 17)
    diffusion = average.scheduler.diffusion
    x_t = diffusion.q_sample(x_start, draws.t, draws.noise)
    with torch.no_grad():
        output = average.unet.eval()(x_t, draws.t).sample
    expected = (output - diffusion.target(x_start, draws.t, draws.noise, "v_prediction")).square().mean()
    assert losses(tmp_path / "tuned")[0] == pytest.approx(expected.item(), rel=1e-4)
    assert losses(tmp_path / "tuned")[0] < 0.8 * losses(tmp_path / "new")[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--resolution 16", r"--resolution 16: expected 8 8, as in --init_from "),
        ("--dataset digits --channels 3 --levels 256", "--channels 3: expected 1, as in --init_from "),
        ("--class_column label", "num_class_embeds=None; expected 11 for 10 classes with --class_dropout 0.1"),
        ("--objective hybrid", "objective='hybrid': not supported with variance_type='fixed_small'"),
    ],
)
def test_init_from_rejects_model_that_does_not_fit(run_training, learned, tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        run_training(tmp_path, "--init_from", str(learned / "ours"), *words.split())
    with pytest.raises(ValueError, match="model 'nowhere' cannot be loaded"):
        run_training(tmp_path, "--init_from", "nowhere")


def twelve_classes(folder, names, shuffle):
    folder.mkdir()
    for number, name in enumerate(names):
        (folder / name).mkdir()
        for i in range(2):
            Image.fromarray(np.full((8, 8), 16 * ((number + shuffle) % 12) + i, np.uint8)).save(
                folder / name / f"{i}.png"
            )
    return str(folder)


def test_class_keeps_its_index_in_data_samples_and_likelihood_bound(run_training, tmp_path, monkeypatch):
    # Twelve classes: as text, 10 comes before 2. The evaluated split lacks the first classes, so its indices differ.
    names = [f"c{number:02d}" for number in range(12)]
    words = ["--class_column", "label", "--levels", "256", "--max_train_steps", "2"]
    run_training(tmp_path / "run", "--dataset", twelve_classes(tmp_path / "data", names, 0), *words)
    pipe = DDPMPipeline.from_pretrained(tmp_path / "run")
    assert pipe.class_names == names

    seen = []
    forward = UNet2DModel.forward

    def note(self, sample, timestep, class_labels=None, return_dict=True):
        seen.append(class_labels)
        return forward(self, sample, timestep, class_labels, return_dict)

    monkeypatch.setattr(UNet2DModel, "forward", note)
    load_script("sample").main(["--model", str(tmp_path / "run"), "--num_inference_steps", "1", "--num_images", "3",
                                "--class_labels", "c10", "c02", "--output", str(tmp_path / "out")])  # fmt: skip
    assert seen.pop().tolist() == [10, 2, 10]
    seen.clear()
    held_out = twelve_classes(tmp_path / "held_out", names[9:], 9)
    load_script("evaluate").main(["--model", str(tmp_path / "run"), "--dataset", held_out, "--split", "train",
                                  "--class_column", "label", "--steps_per_image", "2", "--output",
                                  str(tmp_path / "results.json")])  # fmt: skip
    assert torch.cat(seen).unique().tolist() == [9, 10, 11]
    with pytest.raises(ValueError, match="class 'dog' of the data: expected a class of the model"):
        load_script("evaluate").main(["--model", str(tmp_path / "run"), "--dataset",
                                      twelve_classes(tmp_path / "other", ["c01", "dog"], 0), "--split", "train",
                                      "--class_column", "label", "--output", str(tmp_path / "x.json")])  # fmt: skip


def test_run_does_not_resume_with_other_data(run_training, tmp_path):
    data = twelve_classes(tmp_path / "data", ["a", "b", "c"], 0)
    words = ["--dataset", data, "--class_column", "label", "--levels", "256"]
    run_training(tmp_path / "run", *words, "--max_train_steps", "2")
    (tmp_path / "data" / "a").rename(tmp_path / "data" / "z")
    with pytest.raises(ValueError, match=r"classes=\['b', 'c', 'z'\] \(was \['a', 'b', 'c'\]\)"):
        run_training(tmp_path / "run", *words, "--max_train_steps", "4")
    (tmp_path / "data" / "z").rename(tmp_path / "data" / "a")
    (tmp_path / "data" / "a" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"images=5 \(was 6\)"):
        run_training(tmp_path / "run", *words, "--max_train_steps", "4")


def test_fine_tuned_run_resumes_without_its_source(run_training, learned, tmp_path):
    source = tmp_path / "source"
    DDPMPipeline.from_pretrained(learned / "ours").save_pretrained(source)
    words = ["--init_from", str(source), "--checkpointing_steps", "2", "--dropout", "0.3"]
    run_training(tmp_path / "whole", *words, "--max_train_steps", "4")
    run_training(tmp_path / "parts", *words, "--max_train_steps", "2")
    source.rename(tmp_path / "gone")
    run_training(tmp_path / "parts", *words, "--max_train_steps", "4")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    pipe = DDPMPipeline.from_pretrained(tmp_path / "parts")
    assert pipe.scheduler.config.prediction_type == "v_prediction" and pipe.unet.config.dropout == 0.3


def test_too_many_sampling_steps_are_rejected_before_training(run_training, learned, tmp_path):
    with pytest.raises(ValueError, match="--num_inference_steps 1000: expected at most 20, the number of diffusion"):
        run_training(tmp_path / "short", "--num_train_timesteps", "20", "--max_train_steps", "2")
        run_training(tmp_path, "--init_from", str(tmp_path / "short"), "--num_inference_steps", "1000")
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_streamed_run_handles_signal_to_its_process_group(tmp_path):
    # `timeout` and batch systems signal the whole process group, including the decoding processes.
    data = shards(tmp_path / "data", [numbered(i) for i in range(45)])
    words = ["--dataset", str(data), "--streaming", "--levels", "256", "--max_train_steps", "100000"]
    process = start(tmp_path / "run", *words, "--log_steps", "1", launcher=["setsid", sys.executable])
    wait_for_step(tmp_path / "run", 5, process)
    os.killpg(process.pid, signal.SIGTERM)
    output = end(process)
    assert process.returncode == 128 + signal.SIGTERM, output
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["status"] == "preempted" and newest(tmp_path / "run").name == f"step-{status['step']:09d}"
