import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import load_script

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def main():
    return load_script("reproduce").main


def test_default_dataset_is_dataset_of_run(main, trained, tmp_path, capsys):
    words = ["--model", str(trained), "--output", str(tmp_path), "--num_images", "2", "--samplers", "ddim"]
    assert main(["steps", *words, "--steps", "2"]) == 0
    figures = json.loads((tmp_path / "steps.json").read_text())
    assert figures["made_by"]["dataset"]["name"] == "digits" and figures["made_by"]["extractor"]["name"] == "digits"
    assert "| ddim |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "^command is missing; expected one of progressive, "),
        ("step --model m", "unknown command 'step': did you mean steps?"),
        ("steps", "^--model is missing; expected "),
        ("steps --model no/such/model", "model 'no/such/model' cannot be loaded"),
        ("steps --model m --seed -1", "--seed -1: expected at least 0"),
        ("steps --model m --batch_size 0", "--batch_size 0: expected at least 1"),
        ("steps --model m --steps 0", r"--steps 0: expected at least 1"),
        ("steps --model m --frames 3", "unknown option --frames: see --help"),
        ("ablation --model m", "unknown option --model: see --help"),
        ("ablation --rows x", r"--rows x: expected any of mean-learned"),
    ],
)
def test_invalid_reproduce_options_are_one_line(main, words, message):
    with pytest.raises(ValueError, match=message) as caught:
        main(words.split())
    assert "\n" not in str(caught.value)


def test_reproducing_with_model_without_run_needs_dataset(main, trained, tmp_path):
    from hf_ddpm import DDPMPipeline

    DDPMPipeline.from_pretrained(trained).save_pretrained(tmp_path / "model")
    words = ["steps", "--model", str(tmp_path / "model"), "--output", str(tmp_path / "figures")]
    with pytest.raises(ValueError, match="--dataset is missing: --model .* contains no config.yaml of a run"):
        main(words)
    assert not (tmp_path / "figures").exists()


@pytest.mark.slow
def test_interrupted_ablation_stops_its_run_and_resumes(tmp_path):
    options = "block_out_channels: [8, 16]\nnorm_num_groups: 4\nlayers_per_block: 1\nnum_samples: 4\nwarmup_steps: 1\n"
    file = tmp_path / "tiny.yaml"
    file.write_text(options + "num_inference_steps: 2\ntrain_batch_size: 8\n")
    script = [sys.executable, str(ROOT / "scripts" / "reproduce.py"), "ablation", "--config", str(file)]
    few = ["--num_images", "4", "--num_inference_steps", "2", "--max_train_steps", "150"]
    command = [*script, "--rows", "mean-simple", "--seeds", "0", *few, "--output", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    status = tmp_path / "ablation" / "mean-simple-seed0" / "status.json"
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while not status.exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate()
    assert process.returncode == 143 and "stopped by SIGTERM" in errors
    assert json.loads(status.read_text())["status"] == "preempted"
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert json.loads(status.read_text()) | {"status": "finished", "step": 150} == json.loads(status.read_text())
    assert "| posterior mean: squared error |" in (tmp_path / "ablation.md").read_text()
