import os
import signal
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

import hf_ddpm
from hf_ddpm import train
from hf_ddpm.cli import session
from hf_ddpm.config import Config, parse_config
from hf_ddpm.training.build import start_accelerator
from tests.conftest import TINY_RUN, load_script


@pytest.fixture
def config(tmp_path):
    return parse_config([*TINY_RUN, "--max_train_steps", "2", "--output_dir", str(tmp_path / "run")])


def test_a_run_in_python_is_that_of_the_command(config, trained, run_training, tmp_path):
    assert hf_ddpm.train(config) == tmp_path / "run"
    run_training(tmp_path / "other", "--max_train_steps", "2")
    for name in ("unet/diffusion_pytorch_model.safetensors", "samples.png", "scheduler/scheduler_config.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_a_run_in_python_resumes_and_leaves_its_options_alone(config, tmp_path):
    # Attributes that are set later count, too, when a run is resumed.
    config.training.max_train_steps, config.training.num_train_epochs = None, 1
    config.data.max_train_samples = 16
    before = config.to_dict()
    assert hf_ddpm.train(config) == hf_ddpm.train(config) == tmp_path / "run"
    assert config.to_dict() == before
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-000000002"]


def test_a_config_and_options_are_not_given_both(config):
    with pytest.raises(ValueError, match="options seed, preset are given beside a config: expected one of both"):
        hf_ddpm.train(config, seed=3, preset="digits")


def test_a_dry_run_makes_no_folder(config, capsys):
    config.training.dry_run = True
    folder = hf_ddpm.train(config)
    assert "training:       2 steps of 8 images" in capsys.readouterr().out and not Path(folder).exists()


def test_a_stopped_session_is_an_interrupt_in_python_and_a_code_of_the_command(config, monkeypatch, tmp_path):
    def stop(run, images, callbacks):
        run.stopped_by = signal.SIGTERM

    monkeypatch.setattr(session.loop, "train", stop)
    with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
        hf_ddpm.train(config)
    words = [*TINY_RUN, "--output_dir", str(tmp_path / "other")]
    assert load_script("train").main(words) == 128 + signal.SIGTERM


def test_precisions_may_differ_between_runs_of_a_process(tmp_path):
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


@pytest.mark.parametrize("config", ["runs/a/config.yaml", {"preset": "digits"}])
def test_what_is_no_config_is_refused(config):
    with pytest.raises(ValueError, match="expected a hf_ddpm.Config"):
        train(config)
    with pytest.raises(ValueError, match="unknown option help"):
        train(help=True)


@pytest.mark.parametrize("deterministic", [False, True])
def test_kernels_of_a_gpu_are_fast_or_deterministic(monkeypatch, deterministic):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        start_accelerator(Config.of(preset="digits", mixed_precision="no", deterministic=deterministic))
        assert torch.are_deterministic_algorithms_enabled() is deterministic
        assert torch.backends.cudnn.benchmark is not deterministic
        assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if deterministic else None)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_a_launcher_that_shards_weights_is_refused(monkeypatch, kind):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType(kind))
    with pytest.raises(ValueError, match=f"distributed_type {kind} of the launcher: .*; expected MULTI_GPU"):
        start_accelerator(Config.of(preset="digits", mixed_precision="no"))
