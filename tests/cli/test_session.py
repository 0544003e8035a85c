import os
import re
import signal
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

import hf_ddpm
from hf_ddpm import train
from hf_ddpm.cli import session
from hf_ddpm.config import Config, parse_config
from hf_ddpm.models.precision import Choice
from hf_ddpm.sampling.generate import generate_images
from hf_ddpm.training.build import start_accelerator
from tests.conftest import TINY_RUN, load_script


@pytest.fixture
def config(tmp_path):
    return parse_config([*TINY_RUN, "--max_train_steps", "2", "--output_dir", str(tmp_path / "run")])


def test_train_in_python_equals_command(config, trained, run_training, tmp_path):
    assert hf_ddpm.train(config) == tmp_path / "run"
    run_training(tmp_path / "other", "--max_train_steps", "2")
    for name in ("unet/diffusion_pytorch_model.safetensors", "samples.png", "scheduler/scheduler_config.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_train_in_python_resumes_and_does_not_change_config(config, tmp_path, capsys):
    # Attributes set after the creation of the config are also used.
    config.training.max_train_steps, config.training.num_train_epochs = None, 1
    config.data.max_train_samples = 16
    before = config.to_dict()
    assert hf_ddpm.train(config) == tmp_path / "run"
    assert "all steps are done" not in capsys.readouterr().out
    assert hf_ddpm.train(config) == tmp_path / "run"
    assert "step-000000002, all steps are done (a larger --max_train_steps extends" in capsys.readouterr().out
    assert config.to_dict() == before
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-000000002"]


def test_config_with_further_options_is_rejected(config):
    with pytest.raises(ValueError, match="options seed, preset: not used with config; expected either config or"):
        hf_ddpm.train(config, seed=3, preset="digits")


def test_dry_run_creates_no_folder(config, capsys):
    config.training.dry_run = True
    folder = hf_ddpm.train(config)
    assert "training:       2 steps of 8 images" in capsys.readouterr().out and not Path(folder).exists()


@pytest.mark.parametrize("dry_run", [False, True])
def test_missing_dataset_is_named_before_anything_is_measured_or_written(config, monkeypatch, dry_run, tmp_path):
    monkeypatch.setattr("hf_ddpm.cli.session.resolve_precision", lambda *args: pytest.fail("measured"))
    config.data.dataset, config.training.dry_run = str(tmp_path / "nowhere"), dry_run
    with pytest.raises(ValueError, match="--dataset .*nowhere: does not exist; expected a folder, a file"):
        hf_ddpm.train(config)
    assert not Path(config.training.output_dir).exists()


def test_stopped_run_raises_in_python_and_sets_exit_code_of_command(config, monkeypatch, tmp_path):
    def stop(run, images, callbacks):
        run.stopped_by = signal.SIGTERM

    monkeypatch.setattr(session.loop, "train", stop)
    with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
        hf_ddpm.train(config)
    words = [*TINY_RUN, "--output_dir", str(tmp_path / "other")]
    assert load_script("train").main(words) == 128 + signal.SIGTERM


def test_precisions_may_differ_between_runs_of_process(tmp_path):
    few = {"block_out_channels": [8, 16], "norm_num_groups": 4, "max_train_steps": 1, "eval_metrics": ""}
    few |= {"num_samples": 1, "num_inference_steps": 1}
    state = torch.get_rng_state()
    with torch.no_grad():
        for precision in ("no", "bf16", "no"):
            folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
            train(preset="digits", output_dir=folder, mixed_precision=precision, **few)
            assert f"mixed_precision: '{precision}'".replace("'bf16'", "bf16") in (folder / "config.yaml").read_text()
    assert torch.equal(torch.get_rng_state(), state)
    files = [tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors" for name in "012"]
    assert files[0].read_bytes() == files[2].read_bytes() != files[1].read_bytes()


BF16, FLOAT32 = Choice("bf16", "precision bf16: chosen"), Choice("no", "precision float32: chosen")


@pytest.fixture
def choose(monkeypatch):
    """Set the precision chosen for `auto`; return a list to which the arguments of each call are added."""

    def set_choice(choice):
        calls = []
        monkeypatch.setattr(
            "hf_ddpm.training.build.choose_precision", lambda *args, **options: calls.append((args, options)) or choice
        )
        return calls

    yield set_choice
    AcceleratorState._reset_state(reset_partial_state=True)


def stored_precision(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())["mixed_precision"]


def test_run_stores_precision_of_auto_and_keeps_it(run_training, choose, tmp_path, capsys):
    calls, state = choose(BF16), torch.get_rng_state()
    run_training(tmp_path / "run", "--max_train_steps", "2", "--dropout", "0.1")
    assert torch.equal(torch.get_rng_state(), state)
    ((network, shape, batch), options) = calls[0]
    assert (shape, batch, options) == ((1, 8, 8), 8, {"training": True}) and len(calls) == 1
    assert network.config.block_out_channels == (8, 16) and network.config.dropout == 0.1
    assert capsys.readouterr().out.count("precision bf16: chosen\n") == 1
    assert stored_precision(tmp_path / "run") == "bf16"
    calls = choose(FLOAT32)
    for steps, words in (("3", []), ("4", ["--mixed_precision", "auto"])):
        run_training(tmp_path / "run", "--max_train_steps", steps, "--dropout", "0.1", *words)
    assert calls == [] and stored_precision(tmp_path / "run") == "bf16"
    assert "| precision | bf16 |" in (tmp_path / "run" / "README.md").read_text()
    # The result is the same as with the precision given.
    given = ["--max_train_steps", "4", "--dropout", "0.1", "--mixed_precision"]
    run_training(tmp_path / "given", *given, "bf16")
    weights = Path("unet") / "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (tmp_path / "given" / weights).read_bytes()


def test_auto_in_float32_gives_same_run_as_no(run_training, choose, trained, tmp_path):
    choose(FLOAT32)
    run_training(tmp_path, "--max_train_steps", "4", "--mixed_precision", "auto")
    assert stored_precision(tmp_path) == stored_precision(trained) == "no"
    weights = Path("unet") / "diffusion_pytorch_model.safetensors"
    assert (tmp_path / weights).read_bytes() == (trained / weights).read_bytes()


def test_samples_of_run_use_its_precision(run_training, choose, tmp_path, monkeypatch):
    precisions = []
    monkeypatch.setattr("hf_ddpm.cli.callbacks.generate_images", lambda pipe, ids, sampling, **options: (
        precisions.append(sampling.mixed_precision), generate_images(pipe, ids, sampling, **options))[1])  # fmt: skip
    for choice in (BF16, FLOAT32):
        choose(choice)
        run_training(tmp_path / choice.precision, "--max_train_steps", "1")
    assert precisions == ["bf16", "no"]


def test_memory_is_estimated_for_precision_of_auto(run_training, choose, tmp_path, capsys):
    lines = {}
    for choice in (BF16, FLOAT32):
        choose(choice)
        run_training(tmp_path, "--train_batch_size", "512", "--max_train_steps", "1", "--dry_run")
        (lines[choice],) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory:")]
    passes = {choice: int(re.search("([0-9]+) MiB for a forward", line)[1]) for choice, line in lines.items()}
    assert passes[BF16] < 0.8 * passes[FLOAT32]  # feature maps need half the memory, images and masks the same


@pytest.mark.parametrize("config", ["runs/a/config.yaml", {"preset": "digits"}])
def test_config_of_another_type_is_rejected(config):
    with pytest.raises(ValueError, match="expected a hf_ddpm.Config"):
        train(config)
    with pytest.raises(ValueError, match="unknown option help"):
        train(help=True)


@pytest.mark.parametrize("deterministic", [False, True])
def test_gpu_kernels_are_fast_or_deterministic(monkeypatch, deterministic):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        start_accelerator(Config.of(preset="digits", mixed_precision="no", deterministic=deterministic))
        assert torch.are_deterministic_algorithms_enabled() is deterministic
        assert torch.backends.cudnn.benchmark is not deterministic
        assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if deterministic else None)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_launcher_that_shards_weights_is_rejected(monkeypatch, kind):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType(kind))
    with pytest.raises(ValueError, match=f"distributed_type {kind} of the launcher: .*; expected MULTI_GPU"):
        start_accelerator(Config.of(preset="digits", mixed_precision="no"))
