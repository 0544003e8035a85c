import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_ddpm.config import Config
from hf_ddpm.data import open_images
from hf_ddpm.training import loop
from hf_ddpm.training.build import build_process, build_run, start_accelerator
from hf_ddpm.training.memory import MemoryPlan
from tests.conftest import LIMIT
from tests.gpu.conftest import SMALL_RUN

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder, step):
    return load_file(folder / "checkpoints" / f"step-{step:09d}" / "unet.safetensors")


def start(device, **options):
    config = Config.of(preset="digits", num_samples=4, eval_metrics="", **options)
    accelerator = start_accelerator(config)
    scheduler, source = build_process(config)
    batch = config.training.global_batch_size(1)
    images = open_images(
        config.data, seed=0, batch_size=batch, device=device, main_process_first=accelerator.main_process_first()
    )
    return build_run(config, accelerator, scheduler, source, images), images


class Waits(loop.Callback):
    """Make waiting for the GPU an error from the third step on; the first steps choose kernels and copy the order."""

    def on_step(self, run):
        if run.step == 2:
            torch.cuda.set_sync_debug_mode("error")
        if run.step == 7:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("class_column", [None, "label"])
def test_steps_do_not_wait_for_gpu(cuda, class_column):
    run, images = start(cuda, max_train_steps=8, class_column=class_column, dropout=0.1, mixed_precision="bf16")
    try:
        loop.train(run, images, [Waits()])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run.step == 8


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_run_learns_and_resumes(device, run_training, tmp_path, precision):
    if precision == "fp16" and device.type == "cpu":
        pytest.skip("accelerate has no fp16 on a CPU")
    words = ["--mixed_precision", precision, "--checkpointing_steps", "20", "--max_train_steps"]
    run_training(tmp_path / "whole", *words, "40")
    run_training(tmp_path / "halves", *words, "20")
    run_training(tmp_path / "halves", *words, "40")
    whole, halves = losses(tmp_path / "whole"), losses(tmp_path / "halves")
    assert whole[-1] < 0.7 * whole[0] and halves == pytest.approx(whole, rel=0.05)


def test_deterministic_run_resumes_bit_for_bit(device, run_training, tmp_path):
    words = ["--deterministic", "--checkpointing_steps", "10", "--max_train_steps"]
    try:
        run_training(tmp_path / "whole", *words, "20")
        run_training(tmp_path / "halves", *words, "10")
        run_training(tmp_path / "halves", *words, "20")
    finally:
        torch.use_deterministic_algorithms(False)
    whole, halves = (weights(tmp_path / name, 20) for name in ("whole", "halves"))
    assert all(torch.equal(value, halves[name]) for name, value in whole.items())


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_compiled_run_matches_eager_run_on_gpu(cuda, run_training, tmp_path, precision):
    torch._dynamo.utils.counters.clear()
    torch.compiler.reset()
    words = ["--mixed_precision", precision, "--max_train_steps", "20"]
    run_training(tmp_path / "compiled", *words, "--compile", "true")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    run_training(tmp_path / "eager", *words)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=0.05)


def test_nccl_process_trains(cuda, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", "-m", "hf_ddpm"]
    words = ["train", *SMALL_RUN, "--max_train_steps", "4", "--output_dir", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert process.returncode == 0, process.stderr
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_peak_memory_matches_count(cuda, precision):
    options = {"resolution": [64], "dataset": "digits", "enlarge": True, "block_out_channels": [64, 128, 128]}
    options |= {"attention_resolutions": [16], "norm_num_groups": 32, "train_batch_size": 32, "max_train_steps": 3}
    run, images = start(cuda, mixed_precision=precision, **options)
    need = MemoryPlan(run.config, run.accelerator).count()
    torch.cuda.reset_peak_memory_stats()
    loop.train(run, images)
    assert torch.cuda.max_memory_allocated() == pytest.approx(need.total, rel=0.15)
