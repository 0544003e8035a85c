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

import hf_ddpm
from hf_ddpm.cli import export, status
from hf_ddpm.provenance import model_checksum
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
def test_diffusers_loads_export_of_any_step_and_average(run, tmp_path, words, name):
    assert export.main([str(run), "--step", "2", *words, "--output", str(tmp_path / "model")]) == 0
    weights = diffusers.DDPMPipeline.from_pretrained(tmp_path / "model").unet.state_dict()
    stored = load_file(run / "checkpoints" / "step-000000002" / f"{name}.safetensors")
    assert all(torch.equal(weights[key], stored[key]) for key in stored)
    card, record = (tmp_path / "model" / "README.md").read_text(), json.loads((run / "export.json").read_text())
    assert "2, batch size 8: 16 images seen" in card  # the step of the checkpoint, not of the run
    assert record["step"] == 4  # the run is unchanged


def test_export_in_float16_loads_in_float32_with_rounded_weights(run, tmp_path):
    folder, _ = export.export_model(run, output=tmp_path / "half", dtype="float16")
    stored = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    kept = load_file(run / "checkpoints" / "step-000000004" / "ema-0.995.safetensors")
    assert all(torch.equal(stored[key], kept[key].half()) for key in kept)
    pipe = hf_ddpm.DDPMPipeline.from_pretrained(folder)
    assert pipe.unet.dtype == torch.float32 and not (folder / "samples.png").exists()  # made with other weights
    assert json.loads((folder / "export.json").read_text())["checksum"] == model_checksum(pipe)
    weights = diffusers.DDPMPipeline.from_pretrained(folder).unet.state_dict()
    assert all(torch.equal(weights[key], stored[key].float()) for key in stored)
    with pytest.raises(ValueError, match="--dtype float16: the folder of a run is always float32; expected"):
        export.export_model(run, dtype="float16")


def test_without_output_export_is_in_folder_of_run(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    grid = (folder / "samples.png").read_bytes()
    assert export.export_model(folder) == (folder, 4) and (folder / "samples.png").read_bytes() == grid
    assert export.export_model(folder, average="0.5") == (folder / "ema-0.5", 4)
    assert not (folder / "ema-0.5" / "samples.png").exists()  # the grid of the run is from the first average
    # The folder of a run loads its newest checkpoint, so it cannot have an export of an older step.
    for older in ({"step": 2}, {"step": 2, "output": folder / ".." / "run"}):
        with pytest.raises(ValueError, match="--step 2: only the newest step, 4, is exported to the folder of the run"):
            export.export_model(folder, **older)
    for same in ({}, {"output": folder / ".." / "run"}):
        with exclusive(folder), pytest.raises(ValueError, match="in use by another run; set another --output"):
            export.export_model(folder, **same)


def test_export_overwrites_only_earlier_export(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").touch()
    for folder in (other, tmp_path / "pictures", tmp_path / "pictures" / "a.png"):
        before = sorted(path.name for path in folder.rglob("*"))
        with pytest.raises(ValueError, match="expected a new or empty folder, or the folder of an earlier export"):
            export.export_model(run, output=folder)
        assert sorted(path.name for path in folder.rglob("*")) == before
    for step in (4, 2):
        export.export_model(run, step=step, output=tmp_path / "model")
        assert json.loads((tmp_path / "model" / "export.json").read_text())["step"] == step
        assert (tmp_path / "model" / "samples.png").exists() is (step == 4)


def test_export_has_results_of_its_weights_and_card_written_by_hand(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    record = json.loads((folder / "export.json").read_text())
    (folder / "results.json").write_text(json.dumps({"model": {"name": "x", "checksum": record["checksum"]}}))
    (folder / "README.md").write_text("---\nlicense: mit\n---\nMy model.\n")
    (folder / "samples").mkdir()
    (folder / "samples" / "step-000000002.png").write_bytes(b"grid")
    for step in (4, 2):
        model = tmp_path / f"model-{step}"
        export.export_model(folder, step=step, output=model)
        assert (model / "README.md").read_text().endswith("My model.\n")
        assert (model / "results.json").exists() is (step == 4)
    assert (model / "samples.png").read_bytes() == b"grid"


def test_status_of_folder_without_run_is_rejected(run, tmp_path):
    export.export_model(run, output=tmp_path / "model")
    with pytest.raises(ValueError, match="expected the folder of a run"):
        status.main([str(tmp_path / "model")])
    assert status.main([str(run / "checkpoints" / "step-000000002")]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--step", "3"), r"--step 3: expected a step with a checkpoint \(2, 4\)"),
        (("--average", "0.9"), "average='0.9': expected an average of the run: ema-0.995, ema-0.5"),
    ],
)
def test_missing_steps_and_averages_are_rejected(run, tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        export.main([str(run), *words, "--output", str(tmp_path / "model")])
    assert not (tmp_path / "model").exists()


def test_killed_run_has_status_and_can_be_exported(tmp_path):
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


def test_status_of_finished_run(run, capsys):
    assert status.main(["--run", str(run)]) == 0
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["status"].strip() == "finished" and lines["step"].strip() == "4 of 4 (100%)"
    assert lines["checkpoints"].strip() == "2, 4" and "(step 4)" in lines["last losses"]


def test_error_for_damaged_status_is_one_line(tmp_path):
    (tmp_path / "status.json").write_text("[]")
    (tmp_path / ".lock").touch()
    with pytest.raises(ValueError, match="status.json: cannot be read: status or step is missing"):
        status.main([str(tmp_path)])
    with pytest.raises(ValueError, match="--run nowhere: expected the folder of a run"):
        status.main(["nowhere"])
