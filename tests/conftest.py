"""Shared setup of all tests: one thread, no network access, a temporary cache, and tiny models."""

import importlib
import importlib.util
import os
import signal
import tempfile
from pathlib import Path

# Set before any import of the Hub's clients, which read these variables once.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf_ddpm-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["DIFFUSERS_VERBOSITY"] = "error"

import pytest
import torch

torch.set_num_threads(1)

# Timeout in seconds for other processes and threads; large, so that tests pass on a busy machine.
LIMIT = 600

# Two resolutions, with all parts of a U-Net: attention, shortcuts, resampling, dropout.
TINY_UNET = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": None,
    "dropout": 0.1,
}

# Options of a training run with the same network on the digits.
TINY_RUN = [
    *("--preset", "digits", "--block_out_channels", "8", "16", "--norm_num_groups", "4", "--layers_per_block", "1"),
    *("--train_batch_size", "8", "--num_samples", "4", "--num_inference_steps", "2", "--log_steps", "2"),
    *("--lr_schedule", "constant", "--warmup_steps", "2", "--eval_metrics", ""),
]


@pytest.fixture(autouse=True)
def signal_handlers():
    """Restore the signal handlers after each test; a test that ignores signals could make the next one hang."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def tiny_unet():
    from hf_ddpm import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(**TINY_UNET).eval()


@pytest.fixture
def tiny_pipeline(tiny_unet):
    from hf_ddpm import DDPMPipeline, DDPMScheduler

    pipe = DDPMPipeline(unet=tiny_unet, scheduler=DDPMScheduler(variance_type="fixed_large"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_file(path):
    """Import a file that is not part of a package, and return the module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_script(name):
    """Return the module of a script."""
    name = name.removeprefix("space/")
    if name == "benchmark":
        return importlib.import_module("benchmarks.__main__")
    if name == "train_digits_classifier":
        return load_file(Path(__file__).parents[1] / "scripts" / f"{name}.py")
    command = {"push_to_hub": "push", "app": "demo"}.get(name, name)
    return importlib.import_module(f"hf_ddpm.cli.{command}")


@pytest.fixture(scope="session")
def run_training():
    """Function that trains a tiny network on the digits in this process, and returns the exit code."""
    script = load_script("train")
    return lambda folder, *words: script.main([*TINY_RUN, "--output_dir", str(folder), *words])


@pytest.fixture(scope="session")
def trained(run_training, tmp_path_factory):
    """Folder of a finished tiny run; tests must not write to it."""
    folder = tmp_path_factory.mktemp("trained")
    run_training(folder, "--max_train_steps", "4")
    return folder
