import errno
import hashlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensor

from hf_ddpm import DDPMPipeline, UNet2DModel, train
from hf_ddpm.cli.callbacks import SampleGrid
from hf_ddpm.config import FORMER_DEFAULTS, TrainingConfig, default_options, parse_config
from hf_ddpm.training.checkpoints import Checkpoints
from hf_ddpm.utils.launch import exclusive
from hf_ddpm.utils.runs import find_checkpoint, verify_checkpoint
from tests.conftest import LIMIT, TINY_RUN

ROOT = Path(__file__).parents[2]
FILES = ("unet.safetensors", "ema-0.995.safetensors", "optimizer.safetensors")


def newest(folder):
    return sorted((folder / "checkpoints").glob("step-*"))[-1]


def assert_same_run(one, other):
    """Check that two runs agree bit for bit: weights, averages, optimizer, and all metrics except the speed."""
    assert newest(one).name == newest(other).name
    for name in FILES:
        mine, yours = load_file(newest(one) / name), load_file(newest(other) / name)
        assert mine.keys() == yours.keys()
        assert all(torch.equal(mine[key], yours[key]) for key in mine), name
    lines = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (one, other)]
    for line in [*lines[0], *lines[1]]:
        line.pop("images_per_second")
    assert lines[0] == lines[1]


@pytest.fixture(scope="module")
def uninterrupted(run_training, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_training(folder, "--max_train_steps", "12", "--checkpointing_steps", "4", "--keep_checkpoints", "2")
    return folder


def test_newest_checkpoints_are_kept(uninterrupted):
    assert [path.name for path in sorted((uninterrupted / "checkpoints").iterdir())] == [
        "step-000000008",
        "step-000000012",
    ]
    assert all(verify_checkpoint(path) is None for path in (uninterrupted / "checkpoints").iterdir())


def test_resumed_run_equals_uninterrupted_run(run_training, uninterrupted, tmp_path):
    run_training(tmp_path, "--max_train_steps", "8", "--checkpointing_steps", "4")
    run_training(tmp_path, "--max_train_steps", "12", "--checkpointing_steps", "4")
    assert_same_run(uninterrupted, tmp_path)


def test_damaged_checkpoint_is_skipped_with_warning(run_training, uninterrupted, tmp_path, capsys):
    run_training(tmp_path, "--max_train_steps", "8", "--checkpointing_steps", "4")
    weights = newest(tmp_path) / "unet.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 8, "los')  # as after a kill
    run_training(tmp_path, "--max_train_steps", "12", "--checkpointing_steps", "4")
    assert "step-000000008 is skipped: unet.safetensors does not match its checksum" in capsys.readouterr().out
    assert_same_run(uninterrupted, tmp_path)


def damage(checkpoint):
    weights = checkpoint / "unet.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_new_checkpoints_are_kept_after_resuming_before_damaged_checkpoint(run_training, tmp_path):
    # Without renaming, the damaged checkpoint would remain the newest one by step.
    words = ["--checkpointing_steps", "2", "--keep_checkpoints", "2"]
    run_training(tmp_path, "--max_train_steps", "8", *words)
    damage(newest(tmp_path))
    run_training(tmp_path, "--max_train_steps", "7", "--checkpointing_steps", "1", "--keep_checkpoints", "1")
    assert names(tmp_path) == ["step-000000007", "undone-step-000000008"]
    assert verify_checkpoint(newest(tmp_path)) is None


def test_resuming_from_older_checkpoint_renames_later_ones(run_training, tmp_path):
    run_training(tmp_path, "--max_train_steps", "6", "--checkpointing_steps", "2", "--keep_checkpoints", "3")
    (tmp_path / "checkpoints" / "step-best").mkdir()  # a folder of the user
    (tmp_path / "checkpoints" / ".step-000000009.partial").mkdir()  # left by a kill
    (tmp_path / "checkpoints" / ".trash-step-000000001").mkdir()
    old = str(tmp_path / "checkpoints" / "step-000000002")
    for _ in range(2):
        run_training(tmp_path, "--max_train_steps", "3", "--resume", old, "--keep_checkpoints", "3")
    assert names(tmp_path) == [
        *("step-000000002", "step-000000003", "step-best"),
        *("undone-step-000000003", "undone-step-000000004", "undone-step-000000006"),
    ]


def test_folder_is_locked_for_one_run(run_training, trained, tmp_path):
    with exclusive(tmp_path), pytest.raises(ValueError, match="--output_dir .*: folder is in use by another run"):
        run_training(tmp_path)
    for _ in range(2):
        with exclusive(tmp_path):
            pass


def test_fewer_max_train_steps_than_done_end_run_at_once(run_training, tmp_path, capsys):
    words = ["--lr_schedule", "cosine", "--warmup_steps", "0", "--checkpointing_steps", "4", "--log_steps", "1"]
    run_training(tmp_path, *words, "--max_train_steps", "8")
    shutil.rmtree(newest(tmp_path))  # as if killed after step 4, without an export
    (tmp_path / "model_index.json").unlink()
    before = load_file(newest(tmp_path) / "ema-0.995.safetensors")
    assert run_training(tmp_path, *words, "--max_train_steps", "3") == 0
    rate = 1e-3 * (1 + math.cos(math.pi * 4 / 8)) / 2
    line = f"max_train_steps: 8 -> 4; the cosine learning rate ends at {rate:.3g} instead of 0"
    assert line in capsys.readouterr().out
    pipe, status = DDPMPipeline.from_pretrained(tmp_path), json.loads((tmp_path / "status.json").read_text())
    assert (status["status"], status["step"], status["max_train_steps"]) == ("finished", 4, 4)
    assert all(torch.equal(before[name], value) for name, value in pipe.unet.state_dict().items())
    assert "scheduled for 8 steps, ended at step 4 |" in (tmp_path / "README.md").read_text()


def test_longer_cosine_run_resumes_on_new_schedule(run_training, tmp_path, capsys):
    words = ["--lr_schedule", "cosine", "--warmup_steps", "0", "--log_steps", "1", "--max_train_steps"]
    run_training(tmp_path, *words, "4")
    run_training(tmp_path, *words, "8")
    rates = [1e-3 * (1 + math.cos(math.pi * step / (4 if step < 4 else 8))) / 2 for step in range(8)]
    assert [line["learning_rate"] for line in metrics(tmp_path)] == pytest.approx(rates)
    line = "max_train_steps: 4 -> 8; the cosine learning rate at step 4 is 0.0005 (was 0)"
    assert line in capsys.readouterr().out
    assert json.loads((tmp_path / "export.json").read_text())["lengths"] == [[0, 4], [4, 8]]
    card = (tmp_path / "README.md").read_text()
    assert "scheduled for 4 steps, changed to 8 steps at step 4, ended at step 8 |" in card


def test_incomplete_checkpoints_are_rejected(trained, tmp_path):
    for name in ("step-000000001", ".step-000000002.partial", ".trash-step-000000003"):
        (tmp_path / name).mkdir()
    assert "incomplete or not a checkpoint" in verify_checkpoint(tmp_path / "step-000000001")
    with pytest.raises(ValueError, match="all checkpoints are damaged: step-000000001 is skipped: incomplete"):
        find_checkpoint(tmp_path, "latest")
    with pytest.raises(ValueError, match="--resume .*step-000000001: incomplete or not a checkpoint"):
        find_checkpoint(tmp_path, str(tmp_path / "step-000000001"))
    assert find_checkpoint(tmp_path / "nothing", "latest") == (None, [])


def test_resume_never_rejects_existing_checkpoints(run_training, trained):
    with pytest.raises(ValueError, match="--resume never: checkpoints exist in .*; choose another --output_dir"):
        run_training(trained, "--resume", "never")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--learning_rate 0.5", r"learning_rate=0.5 \(was 0.0"),
        ("--seed 5", r"seed=5 \(was 0\)"),
        ("--block_out_channels 8 24", r"block_out_channels=\[8, 24\]"),
        ("--train_batch_size 16", r"images per step: 16 \(was 8\)"),
        ("--lr_schedule cosine", r"lr_schedule='cosine' \(was 'constant'\)"),
    ],
)
def test_run_does_not_resume_with_other_options(run_training, trained, words, message):
    with pytest.raises(ValueError, match=message):
        run_training(trained, "--max_train_steps", "6", *words.split())


# Clipping and Adam hide the scale of gradients: a large limit switches clipping off.
UNCLIPPED = ["--max_train_steps", "6", "--dropout", "0.1", "--log_steps", "1", "--max_grad_norm", "1e6"]


def assert_same_gradients(one, other):
    """Check losses, gradient norms and Adam's moments up to rounding; weights would not show the scale of gradients."""
    for name in ("loss", "grad_norm"):
        mine, yours = ([line[name] for line in metrics(folder)] for folder in (one, other))
        assert len(mine) == 6 and mine == pytest.approx(yours, rel=1e-4), name
    mine, yours = (load_file(newest(folder) / "optimizer.safetensors") for folder in (one, other))
    for moment in ("exp_avg", "exp_avg_sq"):
        largest = max(value.norm() for name, value in mine.items() if name.endswith(f".{moment}"))
        for name in (name for name in mine if name.endswith(f".{moment}")):
            # Gradients that are zero but for rounding, such as of the keys' biases, have no useful relative error.
            assert (mine[name] - yours[name]).norm() <= 1e-3 * mine[name].norm() + 1e-5 * largest, name


@pytest.mark.parametrize(("batch", "passes"), [(4, 2), (2, 4)])
def test_gradient_accumulation_gives_same_run(run_training, tmp_path, batch, passes):
    run_training(tmp_path / "one", *UNCLIPPED, "--train_batch_size", "8")
    divided = ["--train_batch_size", str(batch), "--gradient_accumulation_steps", str(passes)]
    run_training(tmp_path / "two", *UNCLIPPED, *divided)
    assert_same_gradients(tmp_path / "one", tmp_path / "two")


def test_gradient_accumulation_in_bf16_gives_same_run_up_to_rounding(run_in, tmp_path):
    words = [*UNCLIPPED, "--train_batch_size"]
    run_in("bf16", tmp_path / "one", *words, "8")
    run_in("bf16", tmp_path / "two", *words, "4", "--gradient_accumulation_steps", "2")
    # Gradients are sums over images, and each pass rounds its part of the sum to 8 bits.
    for name, error in (("loss", 2**-9), ("grad_norm", 2**-7)):
        mine, yours = ([line[name] for line in metrics(folder)] for folder in (tmp_path / "one", tmp_path / "two"))
        assert len(mine) == 6 and mine == pytest.approx(yours, rel=error), name


def note_inputs(monkeypatch):
    """Return a list of the inputs of all training passes, and a set of the dtypes of the first convolution."""
    inputs, types, forward = [], set(), UNet2DModel.forward

    def note(self, sample, *args, **kwargs):
        is_noted = self.training and not isinstance(sample, FakeTensor)  # fake tensors only count memory
        if is_noted:
            inputs.append(sample.clone())
            hook = self.conv_in.register_forward_hook(lambda module, inputs, output: types.add(output.dtype))
        output = forward(self, sample, *args, **kwargs)
        if is_noted:
            hook.remove()
        return output

    monkeypatch.setattr(UNet2DModel, "forward", note)
    return inputs, types


@pytest.fixture
def run_in(run_training):
    """Train in a given precision, after resetting accelerate, which allows one precision per process."""

    def run(precision, folder, *words):
        AcceleratorState._reset_state(reset_partial_state=True)
        return run_training(folder, *words, "--mixed_precision", precision)

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


def test_only_network_passes_use_low_precision(run_in, tmp_path, monkeypatch):
    words = ["--max_train_steps", "6", "--checkpointing_steps", "3", "--log_steps", "1", "--dropout", "0.1"]
    seen = {}
    for precision in ("no", "bf16"):
        seen[precision], types = note_inputs(monkeypatch)
        run_in(precision, tmp_path / precision, *words)
        assert types == {torch.float32 if precision == "no" else torch.bfloat16}
        monkeypatch.undo()
    # x_t is identical bit for bit. Rounded to bfloat16, it would contain no noise at small t.
    assert len(seen["no"]) == len(seen["bf16"]) == 6
    assert all(torch.equal(exact, actual) for exact, actual in zip(seen["no"], seen["bf16"], strict=True))
    exact, actual = losses(tmp_path / "no"), losses(tmp_path / "bf16")
    assert actual == pytest.approx(exact, rel=1e-2) and actual != exact
    for name in FILES:
        values = load_file(newest(tmp_path / "bf16") / name)
        assert {value.dtype for value in values.values()} == {torch.float32}, name
        # The stored values are not rounded to bfloat16.
        assert not all(torch.equal(value, value.bfloat16().float()) for value in values.values()), name
    assert next(DDPMPipeline.from_pretrained(tmp_path / "bf16").unet.parameters()).dtype == torch.float32


def test_run_in_low_precision_resumes_bit_for_bit(run_in, tmp_path):
    words = ["--dropout", "0.1", "--log_steps", "1", "--max_train_steps"]
    run_in("bf16", tmp_path / "whole", *words, "6")
    run_in("bf16", tmp_path / "parts", *words, "3")
    run_in("bf16", tmp_path / "parts", *words, "6")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    with pytest.raises(ValueError, match=r"mixed_precision='no' \(was 'bf16'\)"):
        run_in("no", tmp_path / "parts", *words, "7")


@pytest.mark.slow
def test_digits_are_learned_equally_well_in_bf16(tmp_path):
    few = {"max_train_steps": 150, "log_steps": 25, "num_samples": 1, "num_inference_steps": 1, "eval_metrics": ""}
    for precision in ("no", "bf16"):
        AcceleratorState._reset_state(reset_partial_state=True)
        train(preset="digits", output_dir=tmp_path / precision, mixed_precision=precision, **few)
    exact, actual = losses(tmp_path / "no"), losses(tmp_path / "bf16")
    assert exact[-1] < exact[0] / 3 and actual == pytest.approx(exact, rel=0.02)
    AcceleratorState._reset_state(reset_partial_state=True)


def scaler(folder):
    return json.loads((newest(folder) / "state.json").read_text())["scaler"]


def test_loss_scale_is_part_of_checkpoint(run_training, tmp_path, monkeypatch):
    # A loss scale as in float16, which doubles every second step: after resuming at step 3, at step 4 and not at 5.
    def with_scaler(*args, **kwargs):
        accelerator = Accelerator(*args, **kwargs)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        return accelerator

    monkeypatch.setattr("hf_ddpm.training.build.Accelerator", with_scaler)
    words = ["--log_steps", "1", "--max_grad_norm", "1e6", "--max_train_steps"]
    run_training(tmp_path / "whole", *words, "6")
    run_training(tmp_path / "parts", *words, "3")
    assert (scaler(tmp_path / "parts")["scale"], scaler(tmp_path / "parts")["_growth_tracker"]) == (2048, 1)
    run_training(tmp_path / "parts", *words, "6")
    assert scaler(tmp_path / "parts") == scaler(tmp_path / "whole") and scaler(tmp_path / "whole")["scale"] == 8192
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_float16_run_resumes_bit_for_bit_with_its_loss_scale(run_in, tmp_path, monkeypatch, request):
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    words = ["--checkpointing_steps", "6", "--dropout", "0.1", "--log_steps", "1", "--max_train_steps"]
    inputs, types = note_inputs(monkeypatch)
    run_in("fp16", tmp_path / "whole", *words, "6")
    assert types == {torch.float16} and {x_t.dtype for x_t in inputs} == {torch.float32}
    run_in("no", tmp_path / "exact", *words, "6")
    actual, exact = losses(tmp_path / "whole"), losses(tmp_path / "exact")
    assert actual == pytest.approx(exact, rel=5e-2) and actual != exact  # the first steps may be skipped
    for name in FILES:
        assert {value.dtype for value in load_file(newest(tmp_path / "whole") / name).values()} == {torch.float32}
    run_in("fp16", tmp_path / "parts", *words, "3")
    run_in("fp16", tmp_path / "parts", *words, "6")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert scaler(tmp_path / "whole") == scaler(tmp_path / "parts") and scaler(tmp_path / "whole")["scale"] > 0
    rewrite_state(tmp_path / "parts", lambda state: state["scaler"].update(scale=4096.0))
    run_in("fp16", tmp_path / "parts", *words, "7")
    assert scaler(tmp_path / "parts")["scale"] == 4096


def test_failed_run_writes_its_status(run_training, tmp_path):
    with pytest.raises(FloatingPointError, match="the run has diverged: loss (nan|inf) and gradient norm .* at step"):
        run_training(tmp_path, "--learning_rate", "1e30", "--max_train_steps", "20", "--warmup_steps", "0")
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["status"] == "failed" and "FloatingPointError" in status["error"]


def test_weights_that_are_not_finite_are_never_saved(run_training, tmp_path):
    # The loss of the first step is finite, but the weights after it are not, and no metrics are written before the end.
    with pytest.raises(FloatingPointError):
        run_training(tmp_path, "--learning_rate", "1e38", "--max_train_steps", "4", "--checkpointing_steps", "1",
                     "--log_steps", "50", "--warmup_steps", "0")  # fmt: skip
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "unet").exists()


def test_full_disk_keeps_earlier_checkpoints(run_training, tmp_path, monkeypatch):
    def flush(path):
        if "step-000000004" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hf_ddpm.training.checkpoints.flush", flush)
    with pytest.raises(OSError, match="4: checkpoint cannot be written: .*No space left.*; the newest .* is .*2$"):
        run_training(tmp_path, "--max_train_steps", "4", "--checkpointing_steps", "2")
    assert names(tmp_path) == ["step-000000002"] and verify_checkpoint(newest(tmp_path)) is None
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "failed"


def start(folder, *words, launcher=(), **environment):
    command = [*TINY_RUN, "--output_dir", str(folder), *words]
    return subprocess.Popen(
        [*(launcher or [sys.executable]), str(ROOT / "scripts" / "train.py"), *command],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_until(is_so, process):
    """Wait until a condition is true; fail if the process ends first, or after `LIMIT` seconds."""
    end = time.monotonic() + LIMIT
    while not is_so():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end, "timeout"
        time.sleep(0.05)


def wait_for_step(folder, step, process):
    def has_step():
        # The last line may be incomplete.
        path = folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return any(json.loads(line)["step"] >= step for line in lines if line.endswith("\n"))

    wait_until(has_step, process)


def wait_for_output(text, process):
    """Wait until a process has printed a text."""
    output, guard = "", threading.Timer(LIMIT, process.kill)
    guard.daemon = True
    guard.start()
    while text not in output:
        piece = process.stdout.read(1)
        assert piece, output
        output += piece
    guard.cancel()


def end(process):
    """Wait for the end of a process, and return its output."""
    output, _ = process.communicate(timeout=LIMIT)
    return output


@pytest.mark.slow
def test_runs_resume_after_signals_and_kills(run_training, tmp_path):
    words = ["--checkpointing_steps", "50", "--log_steps", "1", "--max_train_steps"]
    folder = tmp_path / "interrupted"
    for number, status in [(signal.SIGTERM, "preempted"), (signal.SIGKILL, "running")]:
        process = start(folder, *words, "1000000")  # too many steps to finish
        wait_for_step(folder, 60 if status == "preempted" else 120, process)
        process.send_signal(number)
        output = end(process)
        assert json.loads((folder / "status.json").read_text())["status"] == status, output
        assert process.returncode == (128 + number if status == "preempted" else -number)
    last = int(newest(folder).name.removeprefix("step-")) + 20
    run_training(folder, *words, str(last))
    run_training(tmp_path / "uninterrupted", *words, str(last))
    assert_same_run(tmp_path / "uninterrupted", folder)
    status = json.loads((folder / "status.json").read_text())
    assert (status["status"], status["step"]) == ("finished", last)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_interrupts_final_sampling(run_training, tmp_path, number):
    words = ["--max_train_steps", "2", "--num_samples", "64"]
    process = start(tmp_path, *words, "--num_inference_steps", "1000")
    wait_for_output("Sampling", process)  # on its progress bar
    process.send_signal(number)
    assert "stopped at step 2" in end(process) and process.returncode == 128 + number
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["status"], status["step"]) == ("preempted", 2)
    assert not (tmp_path / "samples.png").exists()
    run_training(tmp_path, *words)
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "finished"
    assert (tmp_path / "samples.png").exists() and (tmp_path / "unet").exists()


LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no"]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [line["loss"] for line in metrics(folder)]


@pytest.mark.slow
def test_two_processes_or_machines_give_same_run(run_training, tmp_path):
    run_training(tmp_path / "one", *UNCLIPPED)

    local = [*LAUNCH, "--num_machines", "1", "--main_process_port", "0"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    remote = [*LAUNCH, "--num_machines", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", port]
    for name, launchers, passes in [
        ("processes", [local], 1),
        ("processes and passes", [local], 2),
        ("machines", [[*remote, "--machine_rank", rank] for rank in ("0", "1")], 1),
    ]:
        divided = ["--train_batch_size", str(4 // passes), "--gradient_accumulation_steps", str(passes)]
        options = [*UNCLIPPED, *divided]
        processes = [start(tmp_path / name, *options, launcher=one, ACCELERATE_USE_CPU="true") for one in launchers]
        outputs = [process.communicate(timeout=LIMIT)[0] for process in processes]
        assert [process.returncode for process in processes] == [0] * len(launchers), outputs
        assert "2 x cpu" in outputs[0]
        assert_same_gradients(tmp_path / "one", tmp_path / name)
        assert (tmp_path / name / "samples.png").read_bytes() == (tmp_path / "one" / "samples.png").read_bytes()


# Only the main process measures that bf16 is faster; in the other process the measurement fails.
CHOOSING = """
import importlib, os, sys
from hf_ddpm.models import precision

precision.FEWEST_FLOPS = 0
precision.has_bf16 = lambda device: True
precision.measure_gain = lambda *args: {"0": 2.0}[os.environ["RANK"]]
importlib.import_module("hf_ddpm.cli." + sys.argv[1]).main(sys.argv[2:])
"""


@pytest.mark.slow
def test_all_processes_use_precision_of_main_process(tmp_path):
    program = tmp_path / "choosing.py"
    program.write_text(CHOOSING)
    launcher = [*LAUNCH, "--num_machines", "1", "--main_process_port", "0"]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    images, auto = str(tmp_path / "run" / "images"), ["--mixed_precision", "auto"]
    training = ["train", *TINY_RUN, "--output_dir", str(tmp_path / "run"), "--max_train_steps", "2"]
    sampling = ["sample", "--model", str(tmp_path / "run"), "--output", images, "--num_images", "4"]
    for words in (training, [*sampling, "--num_inference_steps", "2"]):
        command = [*launcher, str(program), *words, *auto]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=LIMIT)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("precision bf16: 2.0 times as fast as float32 here") == 1
    assert json.loads((newest(tmp_path / "run") / "state.json").read_text())["config"]["mixed_precision"] == "bf16"
    settings = json.loads(Path(images, "sampling.json").read_text())
    assert settings["mixed_precision"] == "bf16"


def test_signal_during_checkpoint_skips_following_callbacks(run_training, tmp_path, monkeypatch):
    drawn, save = [], Checkpoints.on_checkpoint

    def on_checkpoint(self, run):
        save(self, run)
        if run.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Checkpoints, "on_checkpoint", on_checkpoint)
    for name in ("on_pause", "on_end"):
        monkeypatch.setattr(SampleGrid, name, lambda self, run: drawn.append(run.step))
    words = ["--max_train_steps", "4", "--checkpointing_steps", "2", "--sample_at_checkpoints", "true"]
    assert run_training(tmp_path, *words) == 128 + signal.SIGTERM
    assert drawn == [] and names(tmp_path) == ["step-000000002"]
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "preempted"
    monkeypatch.setattr(Checkpoints, "on_checkpoint", save)
    assert run_training(tmp_path, *words) == 0 and drawn == [4]


def test_checkpoint_is_flushed_before_its_rename_and_old_ones_are_removed_after(run_training, tmp_path, monkeypatch):
    calls, fsync, rename = [], os.fsync, Path.rename
    monkeypatch.setattr(
        os, "fsync", lambda fd: (calls.append(("fsync", os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd))
    )
    monkeypatch.setattr(Path, "rename", lambda a, b: (calls.append(("rename", str(b))), rename(a, b))[1])
    words = ["--max_train_steps", "2", "--checkpointing_steps", "1", "--keep_checkpoints", "1"]
    run_training(tmp_path, *words)
    folder = tmp_path / "checkpoints"
    partial, final = folder / ".step-000000002.partial", folder / "step-000000002"
    assert sorted(file.name for file in final.iterdir()) == sorted(
        ["ema-0.995.safetensors", "manifest.json", "optimizer.safetensors", "state.json", "unet.safetensors"]
    )
    named = calls.index(("rename", str(final)))
    flushed = [path for kind, path in calls[:named] if kind == "fsync" and path.startswith(str(partial))]
    assert sorted(flushed) == sorted(map(str, [partial, *(partial / file.name for file in final.iterdir())]))
    assert flushed[-1] == str(partial)
    following = [call for call in calls[named + 1 :] if str(folder) in call[1]]
    assert following[:2] == [("fsync", str(folder)), ("rename", str(folder / ".trash-step-000000001"))]


@pytest.mark.parametrize(
    "spoil", ["{}", "[]", "null", '{"state.json": {}}', '{"state.json": 3}', "no unet", "no bytes"]
)
def test_incomplete_manifest_counts_as_damage(trained, tmp_path, spoil):
    path = tmp_path / "step-000000004"
    shutil.copytree(newest(trained), path)
    manifest = json.loads((path / "manifest.json").read_text())
    assert verify_checkpoint(path) is None
    if spoil == "no unet":
        spoil = json.dumps({name: entry for name, entry in manifest.items() if name != "unet.safetensors"})
    elif spoil == "no bytes":
        spoil = json.dumps({name: {"sha256": entry["sha256"]} for name, entry in manifest.items()})
    (path / "manifest.json").write_text(spoil)
    assert verify_checkpoint(path) is not None


def rewrite_state(folder, change):
    """Change `state.json` of the newest checkpoint and its manifest, as if written by another version."""
    path = newest(folder)
    state = json.loads((path / "state.json").read_text())
    change(state)
    content = json.dumps(state).encode()
    (path / "state.json").write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["state.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "option",
    [
        "crop",
        "ema_warmup",
        "levels",
        "init_from",
        "skip_bad_images",
        "num_train_epochs",
        "adam_beta1",
        "weight_decay",
        "lr_power",
        "background",
    ],
)
def test_run_of_older_version_resumes_with_missing_options(run_training, trained, tmp_path, option):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)

    def change(state):
        state["config"].pop(option)
        state["config"]["of_another_version"] = 3
        state["data"].pop("classes")

    rewrite_state(folder, change)
    words = [f"--{option}", str(default_options()[option])] if option in ("levels", "background") else []
    if option == "levels":  # the preset's value differs from the default, which the old run used
        with pytest.raises(ValueError, match=rf"checkpoint of a run with other options: .*{option}=.* \(was "):
            run_training(folder, "--max_train_steps", "5")
    if option == "background":
        with pytest.raises(ValueError, match=r"of a run with other options: .*background='blue' \(was 'white'\)"):
            run_training(folder, "--max_train_steps", "5", "--background", "blue")
    assert run_training(folder, "--max_train_steps", "5", *words) == 0


def test_resumed_run_keeps_old_default_of_option(run_training, tmp_path, monkeypatch):
    words = ["--max_train_steps", "1"]
    assert run_training(tmp_path, *words) == 0
    stored = json.loads((newest(tmp_path) / "state.json").read_text())["config"]["learning_rate"]
    # Simulate a changed default: the run used 0.999, the default is now 0.95.
    monkeypatch.setitem(FORMER_DEFAULTS, "adam_beta2", 0.999)
    monkeypatch.setattr(TrainingConfig.__dataclass_fields__["adam_beta2"], "default", 0.95)
    assert parse_config(["--preset", "digits"]).training.adam_beta2 == 0.95
    assert run_training(tmp_path, "--max_train_steps", "2") == 0
    config = json.loads((newest(tmp_path) / "state.json").read_text())["config"]
    assert (config["adam_beta2"], config["learning_rate"]) == (0.999, stored)
    with pytest.raises(ValueError, match=r"adam_beta2=0\.95 \(was 0\.999\)"):
        run_training(tmp_path, "--max_train_steps", "3", "--adam_beta2", "0.95")
