import json
import os
import shutil
import signal

import pytest
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from hf_ddpm import DDPMPipeline
from hf_ddpm.cli import callbacks
from tests.conftest import load_script

EVALUATED = ["--eval_metrics", "fd,nll", "--eval_num_images", "20", "--eval_inference_steps", "2",
             "--eval_steps_per_image", "2", "--eval_steps", "2", "--checkpointing_steps", "2"]  # fmt: skip
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def evaluated(run_training, tmp_path_factory):
    """The folder of a run of 4 steps with two evaluations; tests must not write to it."""
    folder = tmp_path_factory.mktemp("evaluated")
    assert run_training(folder, "--max_train_steps", "4", *EVALUATED) == 0
    return folder


def lines(folder):
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


def without_provenance(results):
    return {name: {k: v for k, v in results[name].items() if k != "made_by"} for name in ("fd", "nll")}


def test_evaluations_in_training_equal_evaluate(evaluated, tmp_path):
    words = ["--model", str(evaluated), "--dataset", "digits", "--metrics", "fd,nll", "--num_images", "20"]
    words += ["--num_inference_steps", "2", "--steps_per_image", "2", "--batch_size", "7"]
    load_script("evaluate").main([*words, "--output", str(tmp_path / "results.json")])
    separate, in_training = (json.loads((f / "results.json").read_text()) for f in (tmp_path, evaluated))
    assert separate["model"]["checksum"] == in_training["model"]["checksum"]
    assert separate["fd"]["value"] == in_training["fd"]["value"]
    assert separate["nll"]["total_bpd"] == pytest.approx(in_training["nll"]["total_bpd"], rel=1e-6)
    assert lines(evaluated)[-1]["fd"]["value"] == separate["fd"]["value"]


def test_evaluations_of_run_sample_in_its_precision_and_compute_bound_in_float32(run_training, evaluated, tmp_path):
    run_training(tmp_path, "--max_train_steps", "4", *EVALUATED, "--mixed_precision", "bf16")
    for folder, precision in ((evaluated, "no"), (tmp_path, "bf16")):
        results = json.loads((folder / "results.json").read_text())
        assert results["fd"]["made_by"]["sampling"]["mixed_precision"] == precision
        assert results["nll"]["made_by"]["mixed_precision"] == "no"
        assert {line["request"]["mixed_precision"] for line in lines(folder)} == {precision}
    card = (tmp_path / "README.md").read_text()
    assert "precision bf16" in next(line for line in card.splitlines() if line.startswith("| Frechet distance"))
    assert "precision bf16" not in next(line for line in card.splitlines() if line.startswith("| bound on the NLL"))
    AcceleratorState._reset_state(reset_partial_state=True)


def test_best_model_is_saved_with_its_results(evaluated):
    first, second = lines(evaluated)
    assert [first["step"], second["step"]] == [2, 4]
    best = min(first, second, key=lambda line: line["fd"]["value"])
    assert without_provenance(json.loads((evaluated / "best" / "results.json").read_text()))["fd"] == best["fd"]
    average = load_file(evaluated / "checkpoints" / f"step-{best['step']:09d}" / "ema-0.995.safetensors")
    kept = DDPMPipeline.from_pretrained(evaluated / "best").unet.state_dict()
    assert all((kept[name] == average[name]).all() for name in average)
    assert not (evaluated / ".evaluation").exists()


@pytest.mark.parametrize(
    ("metric", "scores", "best"), [("fd", [3, 1, 2], 4), ("fd", [1, 3, 2], 2), ("is", [1, 3, 2], 4)]
)
def test_best_model_has_lowest_distance_or_highest_inception_score(
    run_training, tmp_path, monkeypatch, metric, scores, best
):
    values = iter([*scores, 0])

    def evaluate(*args, output, **options):
        output.parent.mkdir(exist_ok=True)
        output.write_text("{}")
        return {metric: {"value": next(values)}}

    monkeypatch.setattr(callbacks, "evaluate", evaluate)
    words = [*EVALUATED, "--eval_metrics", metric, "--max_train_steps", "6", "--keep_checkpoints", "3"]
    run_training(tmp_path, *words)
    average = load_file(tmp_path / "checkpoints" / f"step-{best:09d}" / "ema-0.995.safetensors")
    kept = load_file(tmp_path / "best" / WEIGHTS)
    assert all((kept[name] == average[name]).all() for name in average)


def test_interrupted_evaluation_is_repeated(run_training, tmp_path, monkeypatch):
    evaluate = callbacks.evaluate

    def killed(*args, **options):
        if (tmp_path / "evaluations.jsonl").exists():
            raise KeyboardInterrupt
        return evaluate(*args, **options)

    monkeypatch.setattr(callbacks, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        run_training(tmp_path, "--max_train_steps", "4", *EVALUATED)
    assert [line["step"] for line in lines(tmp_path)] == [2]
    with (tmp_path / "evaluations.jsonl").open("a") as file:
        file.write('{"step": 4, "fd"')
    monkeypatch.undo()
    run_training(tmp_path, "--max_train_steps", "4", *EVALUATED)
    assert [line["step"] for line in lines(tmp_path)] == [2, 4]


def test_only_figures_of_equal_options_are_compared(run_training, evaluated, tmp_path):
    folder = shutil.copytree(evaluated, tmp_path / "run")
    harder = [
        *EVALUATED,
        "--eval_num_images",
        "10",
        "--eval_metrics",
        "kid,fd",
    ]  # of fewer images, distances are larger
    run_training(folder, "--max_train_steps", "6", "--lr_schedule", "constant", *harder)
    assert [line["step"] for line in lines(folder)] == [2, 4, 6]
    assert json.loads((folder / "best" / "results.json").read_text())["kid"]["num_images"] == 10


def test_run_stopped_during_evaluation_resumes(run_training, tmp_path, monkeypatch):
    evaluate = callbacks.evaluate

    def stopped(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **options)

    monkeypatch.setattr(callbacks, "evaluate", stopped)
    assert run_training(tmp_path, "--max_train_steps", "4", *EVALUATED) == 128 + signal.SIGTERM
    assert not (tmp_path / "evaluations.jsonl").exists()  # stops at once, because the checkpoint exists
    monkeypatch.undo()
    assert run_training(tmp_path, "--max_train_steps", "4", *EVALUATED) == 0
    assert [line["step"] for line in lines(tmp_path)] == [2, 4]


@pytest.mark.parametrize("content", ["mine", '{"model": "resnet"}', '{"accuracy": 0.93}', "[1]"])
def test_results_file_of_another_format_is_rejected_before_training(run_training, tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match="results.json: not a results file.*; move it, or choose another path"):
        run_training(tmp_path, "--max_train_steps", "4", *EVALUATED)
    assert (tmp_path / "results.json").read_text() == content and not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--eval_metrics fd --eval_split validation", "--dataset digits: no split 'validation'"),
        ("--eval_metrics fd --eval_num_images 2000", "--eval_num_images 2000: expected at most the 899"),
        (
            "--eval_metrics fd --eval_split train",
            "--eval_split train: equals the reference split, .*--eval_floor false",
        ),
        (
            "--eval_metrics fd --streaming true",
            "--eval_metrics fd: not supported with --streaming true; evaluate after training with hf-ddpm evaluate",
        ),
        ("--eval_metrics fd,speed", "--eval_metrics speed: expected any of fd, kid, is, pr, nll"),
        (
            "--eval_metrics nll --eval_steps 2",
            "--eval_steps 2: expected fd, kid or is first in --eval_metrics",
        ),
        ("--eval_metrics fd --eval_steps 3", "--eval_steps 3: expected a multiple of --checkpointing_steps 2"),
        ("--eval_metrics fd --eval_inference_steps 0", "--eval_inference_steps 0: expected at least 1"),
        ("--eval_metrics fd --eval_inference_steps 1001", "--eval_inference_steps 1001: expected at most 1000"),
        ("--num_inference_steps 2000", "--num_inference_steps 2000: expected at most 1000, the number of diff"),
        ("--eval_metrics nll --eval_steps_per_image 1", "--eval_steps_per_image 1: expected at least 2"),
    ],
)
def test_invalid_evaluation_settings_are_reported_before_training(run_training, tmp_path, words, message):
    with pytest.raises(ValueError, match=message) as caught:
        run_training(tmp_path, "--max_train_steps", "4", "--checkpointing_steps", "2", *words.split())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "metrics.jsonl").exists()
