"""Distillation: stages, resuming, loading the result with diffusers, and errors."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from datasets import load_from_disk
from PIL import Image
from safetensors.torch import load_file, save_file

import hf_ddpm
from hf_ddpm import DDIMScheduler, DDPMPipeline, DDPMScheduler
from hf_ddpm.cli import distill, edit
from hf_ddpm.cli.export import export_model
from hf_ddpm.cli.stages import plan_stages, stage_config
from hf_ddpm.data.store import load_images
from hf_ddpm.pipelines import pipeline_ddpm
from hf_ddpm.sampling.generate import sample_images
from hf_ddpm.training.checkpoints import Checkpoints
from tests.conftest import LIMIT
from tests.training.test_checkpoints import LAUNCH, ROOT, assert_same_run, newest, wait_until

FEW = {"max_train_steps": 4, "checkpointing_steps": 2, "log_steps": 1, "num_samples": 4, "start_steps": 8}
WORDS = [word for name, value in FEW.items() for word in (f"--{name}", str(value))]
STAGES = ("16-steps", "8-steps", "4-steps")


@pytest.fixture(scope="module")
def distilled(trained, tmp_path_factory):
    """The folder of a model distilled to 4 steps; tests must not write to it."""
    folder = tmp_path_factory.mktemp("distilled") / "model"
    assert hf_ddpm.distill(trained, 4, folder, **FEW, eval_metrics="fd", eval_num_images=8) == folder
    return folder


@pytest.fixture(scope="module")
def conditional(run_training, tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    run_training(folder, "--class_column", "auto", "--max_train_steps", "2")
    return folder


def weights(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def scheduler(folder):
    return json.loads((folder / "scheduler" / "scheduler_config.json").read_text())


def test_teacher_of_each_stage_is_previous_stage(distilled, trained):
    statuses = [json.loads((distilled / name / "status.json").read_text()) for name in STAGES]
    assert [(status["status"], status["step"]) for status in statuses] == [("finished", 4)] * 3
    options = [hf_ddpm.Config.of(config=distilled / name / "config.yaml") for name in STAGES]
    assert [config.distillation.student_steps for config in options] == [16, 8, 4]
    assert [config.distillation.student_target for config in options] == ["images", "teacher", "teacher"]
    assert [config.distillation.teacher for config in options] == [
        *(str(trained), str(distilled / "16-steps"), str(distilled / "8-steps")),
    ]
    for name in STAGES:
        assert {"samples.png", "results.json", "metrics.jsonl", "README.md"} <= {
            path.name for path in (distilled / name).iterdir()
        }
        figures = json.loads((distilled / name / "results.json").read_text())["fd"]
        assert figures["made_by"]["sampling"]["num_inference_steps"] == int(name.removesuffix("-steps"))


def test_dry_run_prints_the_cost_of_each_stage_and_writes_nothing(trained, tmp_path, capsys):
    words = ["--model", str(trained), "--steps", "4", "--output", str(tmp_path / "out"), "--dry_run"]
    assert distill.main([*words, *WORDS, "--mixed_precision", "no"]) == 0
    output = capsys.readouterr().out
    for number, stage in enumerate(STAGES, start=1):
        assert f"stage {number} of 3: {stage.replace('-', ' ')}\n" in output
    assert output.count("4 steps of 8 images") == output.count("samples.png:") == 3
    assert not any(tmp_path.iterdir())
    with pytest.raises(ValueError, match="--data_free .*: expected false with --dry_run"):
        distill.main([*words, "--data_free", "true"])


def test_student_starts_from_weights_of_its_teacher(distilled):
    # An Adam step changes a weight by at most the learning rate of 1e-3, so four steps change it by less than 4e-3.
    for teacher, student in zip(STAGES, STAGES[1:], strict=False):
        before = weights(distilled / teacher)
        after = load_file(newest(distilled / student) / "unet.safetensors")
        assert all((after[name] - before[name]).abs().max() < 4e-3 for name in before)
        assert any(not torch.equal(after[name], before[name]) for name in before)


def test_folder_has_last_stage_and_card_of_all_stages(distilled):
    assert all(torch.equal(value, weights(distilled / "4-steps")[name]) for name, value in weights(distilled).items())
    card = (distilled / "README.md").read_text()
    distances = [json.loads((distilled / name / "results.json").read_text())["fd"]["value"] for name in STAGES]
    rows = zip((16, 8, 4), ("trained0", "16-steps", "8-steps"), distances, strict=True)
    for steps, teacher, distance in rows:
        assert f"| {steps} | `{teacher}` | 4 | {distance:.4g} | 8 |" in card
    assert "num_inference_steps=4).images" in card and "progressive distillation" in card
    assert "images, seed 0, 4 steps; not cherry-picked" in card


@pytest.mark.parametrize("pipeline", [diffusers.DDPMPipeline, diffusers.DDIMPipeline])
def test_diffusers_samples_same_images_from_student(distilled, pipeline):
    options = {"batch_size": 3, "output_type": "np"}
    stock, ours = pipeline.from_pretrained(distilled), DDPMPipeline.from_pretrained(distilled)
    assert type(stock.scheduler) is diffusers.DDIMScheduler and type(stock.unet) is diffusers.UNet2DModel
    assert ours.default_steps == 4
    expected = ours(generator=torch.Generator().manual_seed(1), **options).images  # in 4 steps by default
    images = stock(generator=torch.Generator().manual_seed(1), num_inference_steps=4, **options).images
    assert ours.scheduler.timesteps.tolist() == stock.scheduler.timesteps.tolist() == [999, 749, 499, 249]
    np.testing.assert_allclose(images, expected, atol=1e-5)


def test_samples_and_checkpoints_have_steps_of_student(distilled, tmp_path):
    sample_images(distilled, tmp_path / "out", 4)
    assert json.loads((tmp_path / "out" / "sampling.json").read_text())["num_inference_steps"] == 4
    pipe = DDPMPipeline.from_pretrained(newest(distilled / "4-steps"))
    assert pipe.default_steps == 4 and type(pipe.scheduler) is diffusers.DDIMScheduler
    pipe.save_pretrained(tmp_path / "saved")
    assert DDPMPipeline.from_pretrained(tmp_path / "saved").default_steps == 4


def test_stages_that_diffusers_would_sample_differently_do_not_load_in_diffusers(distilled):
    # 1000 / 16 is not an integer: the DDIMScheduler of diffusers would step from 999 to 937 and then from 936.
    index = json.loads((distilled / "16-steps" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "HFDDIMScheduler"]
    pipe = DDPMPipeline.from_pretrained(distilled / "16-steps")
    assert type(pipe.scheduler) is DDIMScheduler and pipe.default_steps == 16
    assert type(DDPMPipeline.from_pretrained(newest(distilled / "16-steps")).scheduler) is DDIMScheduler
    with pytest.raises((AttributeError, ValueError)):
        diffusers.DDPMPipeline.from_pretrained(distilled / "16-steps")


def test_timesteps_that_student_was_not_trained_for_are_logged(distilled, monkeypatch):
    lines = []
    monkeypatch.setattr(pipeline_ddpm, "warn_once", lines.append)
    pipe = DDPMPipeline.from_pretrained(distilled / "16-steps")
    pipe.set_progress_bar_config(disable=True)
    image = torch.zeros(1, 8, 8)
    pipe(1), pipe(1, num_inference_steps=8)  # timesteps of its own
    assert pipe.is_distilled and not lines
    reason = "the model was distilled to 16 steps and not trained for this timestep"
    for call in (
        lambda: pipe(1, num_inference_steps=20),
        lambda: pipe.vary(image, 0.002),
        lambda: pipe.invert(image, 3),
    ):
        call()
        assert reason in lines.pop() and not lines
    assert not DDPMPipeline(pipe.unet, DDPMScheduler()).is_distilled


@pytest.mark.parametrize("name", [".", "16-steps"])
def test_distilled_model_is_rejected_by_edits(distilled, tmp_path, name):
    (tmp_path / "images").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "images" / "a.png")
    words = ["--model", str(distilled / name), "--images", str(tmp_path / "images"), "--output", str(tmp_path / "out")]
    for kind in ("vary", "invert"):
        with pytest.raises(ValueError, match="the model was distilled to .* steps; expected the model that it was"):
            edit.main([kind, *words])
    assert not (tmp_path / "out").exists()


def test_export_of_distilled_model_names_its_last_stage(distilled, tmp_path):
    with pytest.raises(ValueError, match="folder of a distillation; expected the folder of one .* such as .*/4-steps$"):
        export_model(distilled, output=tmp_path / "out")


class Killed(BaseException):
    """End a run like a kill, without cleaning up."""


EVERY = [(steps, step) for steps in (16, 8, 4) for step in (2, 4)]


@pytest.mark.parametrize("places", [[(8, 2)], pytest.param(EVERY, marks=pytest.mark.slow)], ids=["one", "all"])
def test_distillation_interrupted_at_checkpoints_equals_uninterrupted_run(
    trained, distilled, tmp_path, monkeypatch, places
):
    save, left = Checkpoints.on_checkpoint, list(places)

    def cut(self, run):
        save(self, run)
        if (run.config.distillation.student_steps, run.step) in left:
            left.remove((run.config.distillation.student_steps, run.step))
            raise Killed

    monkeypatch.setattr(Checkpoints, "on_checkpoint", cut)
    for _ in places:
        with pytest.raises(Killed):
            hf_ddpm.distill(trained, 4, tmp_path / "cut", **FEW)
    hf_ddpm.distill(trained, 4, tmp_path / "cut", **FEW)
    assert not left
    for name in STAGES:
        assert_same_run(distilled / name, tmp_path / "cut" / name)
        assert scheduler(distilled / name) == scheduler(tmp_path / "cut" / name)
    assert (distilled / "samples.png").read_bytes() == (tmp_path / "cut" / "samples.png").read_bytes()


def start(*words, launcher=(), **environment):
    return subprocess.Popen(
        [*(launcher or [sys.executable]), "-m", "hf_ddpm", "distill", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )


@pytest.mark.slow
def test_distillation_killed_at_any_step_equals_uninterrupted_run(trained, tmp_path):
    words = ["--model", str(trained), "--steps", "4", "--start_steps", "8", "--max_train_steps", "60"]
    words += ["--checkpointing_steps", "20", "--log_steps", "1", "--num_samples", "4"]
    process = start(*words, "--output", str(tmp_path / "whole"))
    assert process.wait(LIMIT) == 0, process.stdout.read()
    places = random.Random(0)
    for name in STAGES:
        metrics, line = tmp_path / "cut" / name / "metrics.jsonl", places.randrange(1, 59)
        process = start(*words, "--output", str(tmp_path / "cut"))
        wait_until(lambda path=metrics, line=line: path.exists() and path.read_text().count("\n") >= line, process)
        process.send_signal(signal.SIGKILL)
        process.wait(LIMIT)
    process = start(*words, "--output", str(tmp_path / "cut"))
    assert process.wait(LIMIT) == 0, process.stdout.read()
    for name in STAGES:
        assert_same_run(tmp_path / "whole" / name, tmp_path / "cut" / name)


@pytest.mark.slow
def test_two_processes_distill_same_model_as_one(trained, tmp_path):
    words = ["--model", str(trained), "--steps", "4", *WORDS, "--max_grad_norm", "1e6", "--train_batch_size"]
    one = start(*words, "8", "--output", str(tmp_path / "one"))
    two = start(*words, "4", "--output", str(tmp_path / "two"), launcher=LAUNCH, ACCELERATE_USE_CPU="true")
    outputs = [process.communicate(timeout=LIMIT)[0] for process in (one, two)]
    assert (one.returncode, two.returncode) == (0, 0), outputs
    for name in STAGES:
        lines = [
            [json.loads(line) for line in (tmp_path / kind / name / "metrics.jsonl").read_text().splitlines()]
            for kind in ("one", "two")
        ]
        for a, b in zip(*lines, strict=True):
            assert (a["loss"], a["grad_norm"]) == pytest.approx((b["loss"], b["grad_norm"]), rel=1e-2)


@pytest.mark.slow
def test_signal_stops_stage_with_checkpoint_and_same_command_resumes(trained, tmp_path, monkeypatch, capsys):
    def stop(self, run):
        run.stopped_by = signal.SIGTERM if run.step == 3 and not stopped else None
        stopped.append(run.stopped_by) if run.stopped_by else None

    stopped = []
    monkeypatch.setattr(hf_ddpm.training.progress.Progress, "on_step", stop, raising=True)
    words = ["--model", str(trained), "--steps", "4", *WORDS, "--output", str(tmp_path / "model")]
    assert distill.main(words) == 128 + signal.SIGTERM
    assert newest(tmp_path / "model" / "16-steps").name == "step-000000003"
    assert "resume:      run the same hf-ddpm distill command" in capsys.readouterr().out
    assert distill.main(words) == 0 and DDPMPipeline.from_pretrained(tmp_path / "model").default_steps == 4


def test_distilled_model_can_be_distilled_further(distilled, tmp_path):
    options = {**FEW, "start_steps": None, "prediction_type": "sample"}
    folder = hf_ddpm.distill(distilled, 1, tmp_path / "one", dataset="digits", **options)
    assert sorted(path.name for path in folder.glob("*-steps")) == ["1-steps", "2-steps"]
    stock, ours = diffusers.DDPMPipeline.from_pretrained(folder), DDPMPipeline.from_pretrained(folder)
    expected = ours(2, torch.Generator().manual_seed(1), output_type="np").images
    images = stock(2, torch.Generator().manual_seed(1), num_inference_steps=1, output_type="np").images
    np.testing.assert_allclose(images, expected, atol=1e-5)


def test_resuming_with_another_teacher_is_rejected(trained, distilled, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(distilled, folder)
    other = tmp_path / "other"
    shutil.copytree(trained, other, ignore=shutil.ignore_patterns("checkpoints"))
    file = other / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"conv_in.bias": torch.ones(8)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"of a run with other options: .*teacher=.* \(with other weights\)"):
        hf_ddpm.distill(other, 4, folder, **FEW)
    assert all(torch.equal(value, weights(distilled)[name]) for name, value in weights(folder).items())


@pytest.mark.parametrize("with_checkpoints", [True, False])
def test_folder_of_another_model_as_output_is_rejected(trained, tmp_path, with_checkpoints):
    ignored = shutil.ignore_patterns() if with_checkpoints else shutil.ignore_patterns("checkpoints")
    shutil.copytree(trained, tmp_path / "model", ignore=ignored)
    with pytest.raises(ValueError, match="--output .*model: folder contains another model or run; expected a new"):
        hf_ddpm.distill(tmp_path / "model", 4, tmp_path / "model", dataset="digits", **FEW)
    assert not list((tmp_path / "model").glob("*-steps"))
    assert all(torch.equal(value, weights(trained)[name]) for name, value in weights(tmp_path / "model").items())


def test_longer_stage_with_trained_later_stage_is_rejected(trained, distilled, tmp_path):
    shutil.copytree(distilled, tmp_path / "model")
    reason = "--max_train_steps 6: .*8-steps was trained from 16-steps with 4 training steps; expected at most 4"
    with pytest.raises(ValueError, match=reason):
        hf_ddpm.distill(trained, 4, tmp_path / "model", **{**FEW, "max_train_steps": 6})
    assert newest(tmp_path / "model" / "16-steps").name == "step-000000004"


def test_data_free_distillation_trains_on_samples_of_model(trained, tmp_path):
    folder = hf_ddpm.distill(trained, 4, tmp_path / "free", data_free=True, free_images=12, **FEW)
    images = load_from_disk(str(folder / "teacher-images"))
    expected = np.load(folder / "teacher-samples" / "shards" / "000000.npy")
    assert len(images) == 12 and expected.shape == (12, 1, 8, 8)
    settings = json.loads((folder / "teacher-samples" / "sampling.json").read_text())
    assert (settings["num_inference_steps"], settings["scheduler"]) == (16, "ddpm")
    options = hf_ddpm.Config.of(config=folder / "4-steps" / "config.yaml")
    assert (options.data.dataset, options.data.levels) == (str(folder / "teacher-images"), 256)
    store = load_images(options.data)
    assert torch.equal(store[torch.arange(12)], torch.from_numpy(expected))

    # Samples of other settings replace the dataset.
    shutil.rmtree(folder / "teacher-samples")
    with pytest.raises(ValueError, match="seed=1 .was 0."):
        hf_ddpm.distill(trained, 4, folder, data_free=True, free_images=12, seed=1, **FEW)
    others = np.load(folder / "teacher-samples" / "shards" / "000000.npy")
    assert not np.array_equal(others, expected)
    store = load_images(options.data)
    assert torch.equal(store[torch.arange(12)], torch.from_numpy(others))


def test_guidance_is_distilled_once_for_models_with_classes(conditional, tmp_path, monkeypatch):
    folder = hf_ddpm.distill(conditional, 4, tmp_path / "model", guidance_scale=3.0, **FEW)
    options = [hf_ddpm.Config.of(config=folder / name / "config.yaml") for name in STAGES]
    assert [config.distillation.teacher_guidance for config in options] == [1.0, 3.0, 1.0]
    pipe = DDPMPipeline.from_pretrained(folder)
    lines = []
    monkeypatch.setattr(pipeline_ddpm, "warn_once", lines.append)
    pipe(1, class_labels=["3"], guidance_scale=3.0)
    assert lines == [
        "guidance_scale=3.0: guidance is applied twice if the model was distilled with guidance; use guidance_scale=1 "
        "for such a model"
    ]
    assert pipe.class_names == [str(digit) for digit in range(10)] and pipe.null_class == 10
    assert pipe(2, class_labels=["3", "7"], output_type="pt").images.shape == (2, 1, 8, 8)
    assert "`16-steps`, guidance scale 3" in (folder / "8-steps" / "README.md").read_text()
    assert "guidance_scale" not in (folder / "README.md").read_text()  # the final model needs no guidance


@pytest.mark.slow
def test_data_free_samples_of_conditional_model_have_classes(conditional, tmp_path):
    free = hf_ddpm.distill(conditional, 8, tmp_path / "free", guidance_scale=3.0, data_free=True, free_images=12, **FEW)
    images = load_from_disk(str(free / "teacher-images"))
    assert images["label"] == [*range(10), 0, 1] and images.features["label"].names == [
        str(digit) for digit in range(10)
    ]


@pytest.mark.parametrize(("words", "length"), [(["--max_train_steps", "5"], 5), (["--num_train_epochs", "2"], 4)])
def test_halving_has_quarter_of_steps_of_run(run_training, tmp_path, words, length):
    run_training(tmp_path / "run", *words, "--max_train_samples", "16")
    pipe = DDPMPipeline.from_pretrained(tmp_path / "run")
    options = distill.DistillConfig(str(tmp_path / "run"), 4, str(tmp_path / "model"))
    stages = [(8, "images"), (4, "teacher")]
    for number, expected in enumerate((2 * length, length // 4)):
        assert stage_config(options, [], pipe, stages, number).training.max_train_steps == expected
        given = stage_config(options, ["--max_train_steps", "7"], pipe, stages, number).training
        assert given.max_train_steps == 7
        given = stage_config(options, ["--num_train_epochs", "7"], pipe, stages, number).training
        assert (given.max_train_steps, given.num_train_epochs) == (None, 7)
    config = stage_config(options, [], pipe, stages, 1)
    assert (config.data.max_train_samples, config.training.train_batch_size, config.training.seed) == (16, 8, 0)
    assert (config.training.lr_schedule, config.model.dropout, config.training.warmup_steps) == ("cosine", 0.0, 0)


def plan(scheduler=None, steps=4, default_steps=1000, **options):
    parts = {"scheduler": scheduler or DDPMScheduler(), "default_steps": default_steps, "null_class": None}
    pipe = type("Pipe", (), {**parts, "is_distilled": DDPMPipeline.is_distilled})()
    return plan_stages(distill.DistillConfig("m", steps, "o", **options), pipe)


def test_stages_halve_down_to_requested_steps():
    halvings = [(64, "teacher"), (32, "teacher"), (16, "teacher"), (8, "teacher"), (4, "teacher")]
    assert plan() == [(128, "images"), *halvings]
    predicts_v = DDPMScheduler(prediction_type="v_prediction")
    assert plan(predicts_v) == halvings and plan(convert=False) == halvings
    assert plan(predicts_v, convert=True) == plan()
    assert plan(predicts_v, 10) == [(40, "teacher"), (20, "teacher"), (10, "teacher")]
    assert plan(predicts_v, 100) == [(100, "teacher")] and plan(predicts_v, 1, start_steps=1) == [(1, "teacher")]
    assert plan(predicts_v, 1, default_steps=8) == [(4, "teacher"), (2, "teacher"), (1, "teacher")]
    few = DDPMScheduler(num_train_timesteps=10)
    assert plan(few, 5, default_steps=10) == [(10, "images"), (5, "teacher")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 3}, "--steps 3: expected a divisor of the 1000 diffusion steps of the model"),
        ({"steps": 1000}, "--steps 1000: expected at most 500, half of the steps of the model"),
        ({"steps": 0}, "--steps 0: expected at least 1"),
        ({"start_steps": 2}, "--start_steps 2: expected --steps 4 times 1, 2, 4, ..."),
        ({"start_steps": 12}, "--start_steps 12: expected --steps 4 times 1, 2, 4, ..."),
        ({"start_steps": 512}, "--start_steps 512: expected at most 500, half of the steps of the model"),
        ({"model": "nothing/there"}, "model 'nothing/there' cannot be loaded"),
        ({"block_out_channels": [8]}, "--block_out_channels: not an option of distill; the model sets it"),
        ({"prediction_type": "epsilon"}, "prediction_type='epsilon': expected one of 'v_prediction'"),
        ({"output_dir": "x"}, "--output_dir: not an option of distill; use --output"),
        ({"push_to_hub": True}, "--push_to_hub: not an option of distill; use hf-ddpm push after"),
        ({"eval_metrics": "fd,nll"}, "--eval_metrics fd,nll: nll is not supported for a distilled model"),
        ({"learning_rat": 1}, r"unknown option --learning_rat: did you mean --learning_rate\?"),
        ({"guidance_scale": 2.0}, "--guidance_scale 2.0: expected 1, because the model was not trained"),
        ({"dataset": "nothing/there/at/all"}, "--dataset nothing/there/at/all: does not exist"),
    ],
)
def test_invalid_distill_options_are_one_line(trained, tmp_path, options, message):
    given = {"model": trained, "steps": 4, "output": tmp_path / "model", **FEW, **options}
    with pytest.raises(ValueError, match=message) as caught:
        hf_ddpm.distill(**given)
    assert "\n" not in str(caught.value)


def test_distilling_model_without_run_needs_dataset(trained, tmp_path):
    DDPMPipeline.from_pretrained(trained).save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match=r"--dataset is missing: .*expected --dataset NAME or --data_free true"):
        hf_ddpm.distill(tmp_path / "stock", 4, tmp_path / "model", **FEW)
    options = {**FEW, "dataset": "digits", "levels": 17, "train_batch_size": 8}
    hf_ddpm.distill(tmp_path / "stock", 4, tmp_path / "model", **options)
    assert DDPMPipeline.from_pretrained(tmp_path / "model").default_steps == 4


def test_file_as_output_is_rejected(trained, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--output .*: expected a folder, not a file"):
        hf_ddpm.distill(trained, 4, tmp_path / "file", **FEW)
