import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from hf_ddpm import DDPMPipeline
from hf_ddpm.pipelines.loading import load_pipeline
from hf_ddpm.provenance import model_checksum
from hf_ddpm.utils.runs import sha256


@pytest.fixture(scope="module")
def run(run_training, tmp_path_factory):
    """The folder of a run with checkpoints of steps 2 and 4 and the export of step 4; do not write to it."""
    folder = tmp_path_factory.mktemp("run")
    run_training(folder, "--max_train_steps", "4", "--checkpointing_steps", "2", "--ema_decay", "0.995", "0.5")
    return folder


@pytest.fixture
def copied(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def without_export(folder):
    for name in ("model_index.json", "export.json", "unet", "scheduler"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def alter(checkpoint, **entries):
    """Change entries of a checkpoint's state, remove entries that are None, and update the manifest."""
    path, manifest = checkpoint / "state.json", json.loads((checkpoint / "manifest.json").read_text())
    state = {name: value for name, value in (json.loads(path.read_text()) | entries).items() if value is not None}
    path.write_text(json.dumps(state))
    manifest[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def assert_is(pipe, checkpoint, average="ema-0.995"):
    weights, stored = pipe.unet.state_dict(), load_file(checkpoint / f"{average}.safetensors")
    assert weights.keys() == stored.keys() and all(torch.equal(weights[name], stored[name]) for name in stored)


def test_checkpoint_loads_as_exported_model(run):
    pipe = load_pipeline(str(run / "checkpoints" / "step-000000004"), "cpu")
    assert model_checksum(pipe) == model_checksum(load_pipeline(str(run), "cpu"))
    assert_is(load_pipeline(str(run / "checkpoints" / "step-000000002"), "cpu"), run / "checkpoints/step-000000002")


def test_run_without_export_loads_its_newest_intact_checkpoint(copied):
    without_export(copied)
    assert_is(DDPMPipeline.from_pretrained(copied), copied / "checkpoints" / "step-000000004")
    damaged = copied / "checkpoints" / "step-000000004" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    assert_is(DDPMPipeline.from_pretrained(copied), copied / "checkpoints" / "step-000000002")
    shutil.rmtree(copied / "checkpoints" / "step-000000002")
    with pytest.raises(ValueError, match=r"model .* cannot be loaded: .*checkpoints: all checkpoints are damaged"):
        load_pipeline(str(copied), "cpu")


def test_later_checkpoint_is_preferred_to_export(copied, monkeypatch):
    shutil.rmtree(copied / "checkpoints" / "step-000000004")
    assert DDPMPipeline.from_pretrained(copied).name_or_path == copied  # the export of step 4; the checkpoint is older
    record = json.loads((copied / "export.json").read_text())
    (copied / "export.json").write_text(json.dumps({**record, "step": 1}))
    lines = []
    monkeypatch.setattr("hf_ddpm.pipelines.pipeline_ddpm.logger.warning", lines.append)
    assert_is(load_pipeline(str(copied), "cpu"), copied / "checkpoints" / "step-000000002")
    assert lines == [f"{copied}: loading the checkpoint of step 2, newer than the export of step 1"]


def test_from_pretrained_passes_arguments_to_diffusers(run):
    checkpoint = run / "checkpoints" / "step-000000004"
    pipe = DDPMPipeline.from_pretrained(checkpoint, torch_dtype=torch.bfloat16)
    assert pipe.unet.dtype == torch.bfloat16 and pipe.name_or_path == str(checkpoint)


def test_checkpoints_of_older_versions_are_built_from_their_options(copied):
    checkpoint = copied / "checkpoints" / "step-000000004"
    expected = model_checksum(DDPMPipeline.from_pretrained(checkpoint))
    alter(checkpoint, unet=None, scheduler=None)
    assert model_checksum(DDPMPipeline.from_pretrained(checkpoint)) == expected
    alter(checkpoint, config={**json.loads((checkpoint / "state.json").read_text())["config"], "init_from": "org/x"})
    with pytest.raises(ValueError, match="step-000000004: written by an older version .*; resume the run"):
        DDPMPipeline.from_pretrained(checkpoint)
