import json
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file

from hf_ddpm import UNet2DModel
from hf_ddpm.config import Config, default_options, parse_config
from hf_ddpm.training.optim import EMA, adam, learning_rate
from hf_ddpm.training.progress import Progress, check_tracker
from hf_ddpm.training.randomness import draw, dropout_keys
from tests.conftest import TINY_RUN


def test_draws_depend_only_on_seed_step_and_position():
    def drawn(seed, step, rows):
        torch.manual_seed(torch.seed())
        return draw(seed, step, rows, (1, 8, 8), 1000, "cpu")

    whole = drawn(0, 7, range(80))
    # For any division of a global batch, within blocks and across them.
    for rows in (range(80), range(0, 32), range(5, 6), range(30, 70)):
        part = drawn(0, 7, rows)
        for name in ("t", "noise", "flip"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[rows.start : rows.stop])
    for other in (drawn(0, 8, range(80)), drawn(1, 7, range(80))):
        assert not torch.equal(whole.noise, other.noise) and not torch.equal(whole.t, other.t)
    assert not torch.equal(whole.noise[:32], whole.noise[32:64])


def test_dropout_keys_depend_only_on_seed_step_and_position():
    whole = dropout_keys(0, 7, range(80), "cpu")
    for rows in (range(0, 32), range(5, 6), range(30, 70)):
        assert torch.equal(dropout_keys(0, 7, rows, "cpu"), whole[rows.start : rows.stop])
    everywhere = [dropout_keys(seed, step, range(80), "cpu") for seed in range(5) for step in range(20)]
    assert len(torch.cat(everywhere).unique()) == 8000 and whole.dtype == torch.int32


def test_draws_have_distributions_of_algorithm_1():
    draws = draw(0, 0, range(20_000), (1, 4, 4), 10, "cpu")
    counts = torch.bincount(draws.t, minlength=10)
    # Within five standard deviations: 2000 +- 5 sqrt(20000 x 0.09), and 0.5 +- 5 x 0.5 / sqrt(20000).
    assert len(counts) == 10 and bool(((counts - 2000).abs() < 212).all())
    assert abs(draws.flip.float().mean() - 0.5) < 0.018
    assert abs(draws.noise.mean()) < 5 / math.sqrt(320_000) and abs(draws.noise.var() - 1) < 5 * math.sqrt(2 / 320_000)


def test_learning_rate_warms_up_then_stays_or_decays_to_zero():
    words = ["--preset", "digits", "--learning_rate", "1e-3", "--warmup_steps", "10", "--max_train_steps", "110"]
    constant = parse_config([*words, "--lr_schedule", "constant"]).training
    assert [learning_rate(constant, step) for step in (0, 4, 9, 10, 109)] == pytest.approx(
        [1e-4, 5e-4, 1e-3, 1e-3, 1e-3]
    )
    cosine = parse_config([*words, "--lr_schedule", "cosine"]).training
    assert [learning_rate(cosine, step) for step in (9, 10, 60, 110)] == pytest.approx([1e-3, 1e-3, 5e-4, 0])
    linear = parse_config([*words, "--lr_schedule", "linear"]).training
    assert [learning_rate(linear, step) for step in (4, 10, 35, 60, 110)] == pytest.approx(
        [5e-4, 1e-3, 7.5e-4, 5e-4, 0]
    )
    cubic = parse_config([*words, "--lr_schedule", "polynomial", "--lr_power", "3"]).training
    assert [learning_rate(cubic, step) for step in (4, 10, 35, 60, 110)] == pytest.approx(
        [5e-4, 1e-3, 1e-3 * 0.75**3, 1e-3 / 8, 0]
    )
    default = parse_config([*words, "--lr_schedule", "polynomial"]).training
    assert [learning_rate(default, step) for step in range(111)] == [learning_rate(linear, step) for step in range(111)]


def test_adam_matches_its_formula_with_and_without_decoupled_weight_decay():
    rate, beta1, beta2, eps = 1e-2, 0.8, 0.95, 1e-8
    words = ["--preset", "digits", "--learning_rate", str(rate), "--adam_beta1", str(beta1), "--adam_beta2", str(beta2)]
    for decay in (0.0, 0.3):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2, bias=False)
        weight = model.weight.detach().double()
        optimizer = adam(model, parse_config([*words, "--weight_decay", str(decay)]).training)
        mean, square = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
        for step in (1, 2):
            gradient = torch.randn(2, 3)
            model.weight.grad = gradient.clone()
            optimizer.step()
            mean = beta1 * mean + (1 - beta1) * gradient.double()
            square = beta2 * square + (1 - beta2) * gradient.double() ** 2
            weight = weight - rate * decay * weight  # decoupled: not part of the moments, unlike L2
            weight = weight - rate * mean / (1 - beta1**step) / ((square / (1 - beta2**step)).sqrt() + eps)
            torch.testing.assert_close(model.weight.detach().double(), weight, rtol=1e-6, atol=1e-7)


def test_default_optimizer_equals_adam_of_torch():
    weights = []
    for make in (
        lambda model: adam(model, parse_config(["--preset", "cifar10"]).training),
        lambda model: torch.optim.Adam(model.parameters(), lr=2e-4, betas=(0.9, 0.999), fused=True),
    ):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer = make(model)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 3)).square().sum().backward()
            optimizer.step()
        weights.append(model.weight.detach().clone())
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("epochs", "images", "batch", "accumulation", "processes", "steps"),
    [
        (3, 100, 10, 1, 1, 30),
        (3, 100, 10, 1, 2, 15),
        (3, 100, 10, 2, 2, 8),
        (1, 7, 16, 1, 1, 1),
        (2, 101, 10, 1, 1, 21),
    ],
)
def test_epochs_are_converted_to_steps(epochs, images, batch, accumulation, processes, steps):
    training = Config.of(
        preset="digits", num_train_epochs=epochs, train_batch_size=batch, gradient_accumulation_steps=accumulation
    ).training
    assert training.counted(images, processes).max_train_steps == steps and training.max_train_steps is None
    seen = batch * accumulation * processes
    assert (steps - 1) * seen < epochs * images <= steps * seen


@pytest.mark.parametrize("words", [[], ["--streaming", "true"]], ids=["decoded", "streamed"])
def test_run_with_epochs_trains_and_resumes(run_training, tmp_path, words):
    # 20 images, 4 x 2 per step: 2 epochs are 5 steps, 3 epochs are 8.
    folder = tmp_path / "digits"
    folder.mkdir()
    for number in range(20):
        Image.fromarray(np.full((8, 8), number, dtype=np.uint8)).save(folder / f"{number}.png")
    if words:
        pixels = [Image.open(folder / f"{number}.png") for number in range(20)]
        (tmp_path / "stream").mkdir()
        Dataset.from_dict({"image": pixels}).to_parquet(str(tmp_path / "stream" / "train.parquet"))
        folder = tmp_path / "stream"
    words = [*words, "--dataset", str(folder), "--train_batch_size", "4", "--gradient_accumulation_steps", "2"]
    run = tmp_path / "run"
    assert run_training(run, *words, "--num_train_epochs", "2") == 0
    assert json.loads((run / "status.json").read_text())["step"] == 5
    config = parse_config(["--config", str(run / "config.yaml")])
    assert (config.training.num_train_epochs, config.training.max_train_steps) == (2, None)
    assert run_training(run, *words, "--num_train_epochs", "3") == 0
    assert json.loads((run / "status.json").read_text())["step"] == 8
    assert run_training(run, *words, "--max_train_steps", "9") == 0
    assert json.loads((run / "status.json").read_text())["step"] == 9


def test_average_matches_its_formula():
    model = torch.nn.Linear(2, 2)
    ema, expected = EMA(model, 0.9), model.weight.detach().clone()
    for step in range(5):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 2))
        ema.update(step)
        expected = 0.9 * expected + 0.1 * model.weight.detach()
    torch.testing.assert_close(ema.model.weight, expected)
    assert not ema.model.weight.requires_grad


def test_average_warms_up():
    model = torch.nn.Linear(1, 1, bias=False)
    ema = EMA(model, 0.9999, warmup=True)
    torch.nn.init.zeros_(ema.model.weight)
    torch.nn.init.ones_(model.weight)
    ema.update(0)
    assert ema.model.weight.item() == pytest.approx(0.9)  # decay 1 / 10
    ema.update(8)
    assert ema.model.weight.item() == pytest.approx(0.95)  # decay 9 / 18


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("decay", "warmup"), [(0.99, False), (0.9999, True)])
def test_initial_share_matches_average(decay, warmup):
    # The initial weights are 0 and all later ones 1: the difference of the average from 1 is the initial share.
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    ema = EMA(model, decay, warmup=warmup)
    torch.nn.init.ones_(model.weight)
    for step in range(30):
        assert ema.initial_share(step) == pytest.approx(1 - ema.model.weight.item(), abs=1e-6)
        ema.update(step)


def test_average_of_mostly_initial_weights_prints_warning(run_training, tmp_path, capsys):
    run_training(tmp_path / "warm", "--max_train_steps", "2", "--ema_decay", "0.9999")
    assert "initial weights" not in capsys.readouterr().out
    run_training(tmp_path / "cold", "--max_train_steps", "2", "--ema_decay", "0.9999", "--ema_warmup", "false")
    assert "--ema_decay 0.9999: 100% of the exported average will be initial weights" in capsys.readouterr().out


def test_process_that_does_not_end_in_noise_needs_option(run_training, tmp_path):
    words = ["--max_train_steps", "1", "--num_train_timesteps", "50", "--beta_schedule", "linear"]
    literal = ["--beta_start", "0.0001", "--beta_end", "0.02"]
    with pytest.raises(ValueError, match=r"x_T keeps 60.3% of the variance of the images \(L_T up to 0.67 bits/dim\)"):
        run_training(tmp_path / "a", *words, *literal)
    assert run_training(tmp_path / "b", *words, *literal, "--allow_terminal_signal", "true") == 0
    assert run_training(tmp_path / "c", *words) == 0


def test_digits_are_learned(run_training, tmp_path):
    # A hundred steps of a tiny network: the loss falls from 1, the loss of predicting no noise.
    run_training(tmp_path, "--max_train_steps", "100", "--log_steps", "10", "--learning_rate", "3e-3")
    losses = [line["loss"] for line in metrics(tmp_path)]
    assert losses[0] > 0.8 and np.mean(losses[-3:]) < 0.5
    assert [line["step"] for line in metrics(tmp_path)] == list(range(10, 101, 10))
    assert metrics(tmp_path)[-1]["images"] == 800
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["status"], status["step"], status["images"]) == ("finished", 100, 898)


def test_dry_run_prints_cost_and_writes_nothing(run_training, tmp_path, capsys):
    later = ["--eval_metrics", "fd", "--eval_steps", "100", "--checkpointing_steps", "100"]
    run_training(tmp_path / "run", "--max_train_steps", "1000", *later, "--dry_run")
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    unet = UNet2DModel(**parse_config(TINY_RUN).unet())
    assert lines["parameters"].strip() == f"{unet.num_parameters():,}"
    assert "1,000 steps of 8 images" in lines["training"] and "898 of 1 x 8 x 8" in lines["images"]
    assert lines["samples.png"].count("(h:m:s)") == 1
    run_training(tmp_path / "run", "--max_train_steps", "1000", *later, "--sample_at_checkpoints", "true", "--dry_run")
    assert re.search(r"samples.png: +10 times \S+ \(h:m:s\): \S+ \(h:m:s\)\n", capsys.readouterr().out)
    assert not any(tmp_path.iterdir())


def test_speed_excludes_time_between_steps(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("hf_ddpm.training.progress.time.perf_counter", lambda: now[0])
    training = SimpleNamespace(max_train_steps=8, log_steps=4)
    run = SimpleNamespace(
        config=SimpleNamespace(training=training), step=0, losses=torch.ones(8), t=torch.zeros(8, dtype=torch.int64),
        diffusion=range(10), global_batch_size=8, grad_norm=1.0, stopped_by=None, accelerator=Accelerator(cpu=True),
        optimizer=SimpleNamespace(param_groups=[{"lr": 1.0}]), check_finite=lambda: None,
        logs_now=False, images_per_second=None,
    )  # fmt: skip
    progress = Progress(tmp_path / "metrics.jsonl")
    progress.on_start(run)
    for step in range(1, 9):
        now[0], run.step, run.logs_now = now[0] + 2, step, step % 4 == 0
        progress.on_step(run)
        if step in (2, 4):
            progress.on_pause(run)
            now[0] += 1000  # an evaluation
    progress.on_end(run)
    assert [line["images_per_second"] for line in metrics(tmp_path)] == [4, 4]


def test_metrics_are_logged_to_tracker(run_training, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_training(tmp_path, "--max_train_steps", "4", "--tracker", "tensorboard")
    run_training(tmp_path, "--max_train_steps", "6", "--tracker", "tensorboard")
    events = EventAccumulator(str(tmp_path / "hf_ddpm"))
    events.Reload()
    for name in ("loss", "grad_norm", "learning_rate"):
        logged = {event.step: event.value for event in events.Scalars(name)}
        assert logged == pytest.approx({line["step"]: line[name] for line in metrics(tmp_path)})
    assert [event.step for event in events.Images("samples")] == [4, 6]


def test_missing_tracker_package_is_rejected(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--tracker wandb: package is not installed; run `pip install wandb`"):
        check_tracker("wandb")


def test_gradient_checkpointing_gives_same_run(run_training, tmp_path):
    # Dropout masks are recomputed identically.
    words = ["--max_train_steps", "3", "--dropout", "0.2", "--log_steps", "1"]
    run_training(tmp_path / "kept", *words)
    run_training(tmp_path / "twice", *words, "--gradient_checkpointing")
    kept, twice = metrics(tmp_path / "kept"), metrics(tmp_path / "twice")
    assert [line["loss"] for line in kept] == [line["loss"] for line in twice]


@pytest.mark.parametrize("defect", [False, True])
def test_compiled_network_is_checked(run_training, tmp_path, monkeypatch, defect):
    def compile(unet):
        if defect:  # simulates a compiler that drops a branch of the backward pass
            block = unet.down_blocks[0].resnets[0]
            forward = block.forward
            block.forward = lambda x, emb: forward(x, emb.detach())
        called.append(unet)

    called = []
    monkeypatch.setattr(UNet2DModel, "compile", compile)
    words = ["--max_train_steps", "2", "--log_steps", "1", "--dropout", "0.2"]
    if defect:
        with pytest.raises(FloatingPointError, match="wrong gradients for .* of .* parameters, such as time_emb"):
            run_training(tmp_path, *words, "--compile")
    else:
        run_training(tmp_path / "compiled", *words, "--compile")
        run_training(tmp_path / "plain", *words)
        lines = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("compiled", "plain")]
        assert lines[0] == lines[1]  # the check does not change the run
    assert len(called) == 1


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="nothing compiles here")
def test_compiled_run_matches_eager_run(run_training, tmp_path):
    # One resolution, with attention in the middle block: larger networks take minutes to compile.
    small = ["--block_out_channels", "8", "--attention_resolutions", "0", "--dropout", "0.2"]
    words = ["--max_train_steps", "4", "--log_steps", "1", "--max_grad_norm", "1e6", *small]
    torch.compiler.reset()
    run_training(tmp_path / "compiled", *words, "--compile")
    torch.compiler.reset()
    run_training(tmp_path / "plain", *words)
    compiled, plain = metrics(tmp_path / "compiled"), metrics(tmp_path / "plain")
    assert len(compiled) == 4
    for name in ("loss", "grad_norm"):  # equal up to rounding, as the kernels differ
        assert [line[name] for line in compiled] == pytest.approx([line[name] for line in plain], rel=1e-3)
    for file in ("unet", "ema-0.995"):
        files = [tmp_path / run / "checkpoints/step-000000004" / f"{file}.safetensors" for run in ("compiled", "plain")]
        mine, yours = map(load_file, files)
        assert mine.keys() == yours.keys()  # without the compiler's prefix of names
    assert mine["conv_out.weight"].abs().sum() > 0


def test_another_number_of_processes_than_world_size_is_rejected(run_training, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--world_size 2: expected 1, the number of processes"):
        run_training(tmp_path, "--world_size", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="WORLD_SIZE 3: only 1 of the processes are connected; start them with"):
        run_training(tmp_path)
    assert not any(tmp_path.iterdir())


def test_options_override_launchers_precision_and_compiling(monkeypatch):
    words = ["--preset", "digits"]
    assert chosen(words) == ("auto", False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    assert chosen(words) == ("bf16", True)
    assert chosen([*words, "--mixed_precision", "no", "--compile", "false"]) == ("no", False)
    # A resumed run keeps its precision; options that only affect speed may change.
    stored = {**default_options(), "mixed_precision": "fp16", "compile": False}
    assert parse_config(words).resumed(stored).training.mixed_precision == "fp16"
    assert parse_config(words).resumed(stored).training.compile is True
    given = parse_config([*words, "--mixed_precision", "no"])
    assert given.resumed(stored).training.mixed_precision == "no"  # raises an error later, see test_checkpoints.py
    auto = parse_config([*words, "--mixed_precision", "auto"])
    assert auto.training.mixed_precision == "auto" and auto.resumed(stored).training.mixed_precision == "fp16"
    del stored["mixed_precision"]  # as stored by a version without this option
    assert parse_config(words).resumed(stored).training.mixed_precision == "no"


def chosen(words):
    training = parse_config(words).training
    return training.mixed_precision, training.compile


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "MIXED_PRECISION",
            "fp8",
            "mixed_precision='fp8' of the launcher: not supported; expected no, bf16, fp16, or --",
        ),
        (
            "DYNAMO_BACKEND",
            "AOT_EAGER",
            "dynamo_backend='aot_eager' of the launcher: not supported; expected no, inductor, or --compile",
        ),
    ],
)
def test_unsupported_launcher_settings_are_one_line(monkeypatch, name, value, message):
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(ValueError, match=message):
        parse_config(["--preset", "digits"])


def test_run_keeps_launchers_precision_when_resumed(run_training, tmp_path, monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    run_training(tmp_path, "--max_train_steps", "2")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    run_training(tmp_path, "--max_train_steps", "3")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["mixed_precision"] == "bf16"
    AcceleratorState._reset_state(reset_partial_state=True)
