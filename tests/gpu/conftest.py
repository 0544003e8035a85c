"""Tests that need a GPU, and are skipped without one.

`HF_DDPM_GPU_TESTS_ON=cpu pytest -m gpu tests/gpu` runs those tests that also work on a CPU, to check them.
"""

import os

import pytest
import torch

from tests.conftest import load_script


@pytest.fixture(scope="session")
def device():
    name = os.environ.get("HF_DDPM_GPU_TESTS_ON", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return torch.device(name)


@pytest.fixture
def cuda(device):
    """The device of tests that require CUDA."""
    if device.type != "cuda":
        pytest.skip("no GPU")
    return device


@pytest.fixture
def without_tf32():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


# Two resolutions, attention, dropout: takes half a minute to compile, and milliseconds per step.
SMALL_RUN = [
    *("--preset", "digits", "--block_out_channels", "32", "64", "--norm_num_groups", "8", "--dropout", "0.1"),
    *("--train_batch_size", "64", "--num_samples", "4", "--num_inference_steps", "2", "--log_steps", "5"),
    *("--lr_schedule", "constant", "--warmup_steps", "2", "--eval_metrics", ""),
]


@pytest.fixture
def run_training(device):
    script = load_script("train")
    return lambda folder, *words: script.main([*SMALL_RUN, "--output_dir", str(folder), *words])
