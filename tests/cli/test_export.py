import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from hf_ddpm.cli import export, status
from hf_ddpm.utils.launch import exclusive
from tests.conftest import LIMIT, TINY_RUN

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(run_training, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    words = ["--checkpointing_steps", "2", "--ema_decay", "0.995", "0.5", "--log_steps", "1"]
    run_training(folder, "--max_train_steps", "4", *words)
    return folder


@pytest.mark.parametrize(("words", "name"), [((), "ema-0.995"), (("--average", "0.5"), "ema-0.5")])
def test_diffusers_loads_the_export_of_a_step_and_an_average(run, tmp_path, words, name):
    assert export.main([str(run), "--step", "2", *words, "--output", str(tmp_path / "model")]) == 0
    weights = diffusers.DDPMPipeline.from_pretrained(tmp_path / "model").unet.state_dict()
    stored = load_file(run / "checkpoints" / "step-000000002" / f"{name}.safetensors")
    assert all(torch.equal(weights[key], stored[key]) for key in stored)
    card, record = (tmp_path / "model" / "README.md").read_text(), json.loads((run / "export.json").read_text())
    assert "2 of 8 images: 16 images seen" in card  # of the checkpoint, not of the run
    assert record["step"] == 4  # the run is as it was


def test_without_an_output_the_run_has_the_export(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    assert export.export_model(folder, step=2) == (folder, 2)
    assert json.loads((folder / "export.json").read_text())["step"] == 2 and not (folder / "samples.png").exists()
    assert export.export_model(folder, average="0.5") == (folder / "ema-0.5", 4)
    with exclusive(folder), pytest.raises(ValueError, match="in use by another run; --output takes another folder"):
        export.export_model(folder)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--step", "3"), "step=3 is not allowed: checkpoints are kept of 2, 4"),
        (("--average", "0.9"), "average='0.9' is not allowed: the run has ema-0.995, ema-0.5"),
    ],
)
def test_what_a_run_does_not_have_is_refused(run, tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        export.main([str(run), *words, "--output", str(tmp_path / "model")])
    assert not (tmp_path / "model").exists()


def test_a_killed_run_has_a_status_and_is_a_model(tmp_path):
    folder = tmp_path / "run"
    words = [*TINY_RUN, "--max_train_steps", "1000000", "--checkpointing_steps", "5", "--output_dir", str(folder)]
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_ddpm", "train", *words],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        end = time.monotonic() + LIMIT
        while not list(folder.glob("checkpoints/step-*")) and time.monotonic() < end and process.poll() is None:
            time.sleep(0.05)
        alive = status.describe(folder)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert alive["status"] == "running" and "of 1,000,000" in alive["step"]
    killed, content = status.describe(folder), json.loads((folder / "status.json").read_text())
    assert killed["status"].startswith("killed") and "time left" not in killed
    left, rate = content["seconds_left"], content["images_per_second"]
    assert left == pytest.approx((1_000_000 - content["step"]) * 8 / rate, abs=0.1)
    assert export.export_model(folder)[1] >= 5


def test_the_status_of_a_finished_run(run, capsys):
    assert status.main(["--run", str(run)]) == 0
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["status"].strip() == "finished" and lines["step"].strip() == "4 of 4 (100%)"
    assert lines["checkpoints"].strip() == "2, 4" and "(step 4)" in lines["last losses"]


def test_a_damaged_status_is_one_line(tmp_path):
    (tmp_path / "status.json").write_text("[]")
    with pytest.raises(ValueError, match="status.json cannot be read: status or step is missing"):
        status.main([str(tmp_path)])
    with pytest.raises(ValueError, match="run='nowhere' is not allowed: it holds no status.json of a run"):
        status.main(["nowhere"])
