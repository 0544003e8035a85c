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
    assert "2, batch size 8: 16 images seen" in card  # of the checkpoint, not of the run
    assert record["step"] == 4  # the run is as it was


def test_without_an_output_the_run_has_the_export(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    drawn = (folder / "samples.png").read_bytes()
    assert export.export_model(folder) == (folder, 4) and (folder / "samples.png").read_bytes() == drawn
    assert export.export_model(folder, average="0.5") == (folder / "ema-0.5", 4)
    assert not (folder / "ema-0.5" / "samples.png").exists()  # the run's is of the first average
    # An older step would not be what loads: the newest checkpoint is.
    for again in ({"step": 2}, {"step": 2, "output": folder / ".." / "run"}):
        with pytest.raises(ValueError, match="--step 2: the run's folder is for its newest step, 4; give --output"):
            export.export_model(folder, **again)
    for same in ({}, {"output": folder / ".." / "run"}):
        with exclusive(folder), pytest.raises(ValueError, match="in use by another run; --output takes another folder"):
            export.export_model(folder, **same)


def test_an_export_overwrites_nothing_but_an_earlier_one(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").touch()
    for folder in (other, tmp_path / "pictures", tmp_path / "pictures" / "a.png"):
        before = sorted(path.name for path in folder.rglob("*"))
        with pytest.raises(ValueError, match="expected a new or empty folder, or that of an earlier export"):
            export.export_model(run, output=folder)
        assert sorted(path.name for path in folder.rglob("*")) == before
    for step in (4, 2):
        export.export_model(run, step=step, output=tmp_path / "model")
        assert json.loads((tmp_path / "model" / "export.json").read_text())["step"] == step
        assert (tmp_path / "model" / "samples.png").exists() is (step == 4)


def test_an_export_has_the_results_of_its_weights_and_a_card_of_a_person(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    record = json.loads((folder / "export.json").read_text())
    (folder / "results.json").write_text(json.dumps({"model": {"name": "x", "checksum": record["checksum"]}}))
    (folder / "README.md").write_text("---\nlicense: mit\n---\nMy model.\n")
    (folder / "samples").mkdir()
    (folder / "samples" / "step-000000002.png").write_bytes(b"drawing")
    for step in (4, 2):
        model = tmp_path / f"model-{step}"
        export.export_model(folder, step=step, output=model)
        assert (model / "README.md").read_text().endswith("My model.\n")
        assert (model / "results.json").exists() is (step == 4)
    assert (model / "samples.png").read_bytes() == b"drawing"


def test_what_is_no_run_of_this_package_has_no_status(run, tmp_path):
    export.export_model(run, output=tmp_path / "model")
    with pytest.raises(ValueError, match="expected the folder of a run"):
        status.main([str(tmp_path / "model")])
    assert status.main([str(run / "checkpoints" / "step-000000002")]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--step", "3"), "step=3 is not allowed: checkpoints are kept of 2, 4"),
        (("--average", "0.9"), "average='0.9': expected an average of the run: ema-0.995, ema-0.5"),
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
    (tmp_path / ".lock").touch()
    with pytest.raises(ValueError, match="status.json cannot be read: status or step is missing"):
        status.main([str(tmp_path)])
    with pytest.raises(ValueError, match="run='nowhere' is not allowed: expected the folder of a run"):
        status.main(["nowhere"])
