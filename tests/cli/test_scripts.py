import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hf_ddpm import DDPMPipeline, UNet2DModel
from hf_ddpm.cli import callbacks
from hf_ddpm.config import DataConfig, parse_config
from hf_ddpm.data.batches import batch_indices
from hf_ddpm.data.sources import choose
from hf_ddpm.data.store import load_images
from hf_ddpm.evaluation.results import METRIC_SEED
from hf_ddpm.sampling.generate import generate_images
from hf_ddpm.sampling.options import Sampling
from hf_ddpm.training.randomness import draw
from hf_ddpm.utils.launch import run_script, use_own_cores
from hf_ddpm.utils.seeds import BOUND_NOISE, SAMPLES, derived_seed, generator, hashed_keys, normal_noise
from tests.conftest import TINY_RUN, load_script

ROOT = Path(__file__).parents[2]


def test_training_writes_all_files(trained):
    names = {path.name for path in trained.iterdir()} - {".lock"}
    assert names == {
        "checkpoints", "config.yaml", "metrics.jsonl", "model_index.json", "samples.png", "scheduler", "status.json",
        "unet", "README.md", "loss.png", "export.json",
    }  # fmt: skip
    assert type(DDPMPipeline.from_pretrained(trained).unet) is UNet2DModel
    assert type(diffusers.DDPMPipeline.from_pretrained(trained).unet) is diffusers.UNet2DModel
    assert parse_config(["--config", str(trained / "config.yaml")]).training.max_train_steps == 4
    assert Image.open(trained / "samples.png").size == (2 * 70 + 6, 2 * 70 + 6)


def test_export_has_averaged_weights(trained):
    exported = load_file(trained / "unet" / "diffusion_pytorch_model.safetensors")
    average = load_file(trained / "checkpoints" / "step-000000004" / "ema-0.995.safetensors")
    assert all(torch.equal(exported[name], average[name]) for name in average)


def test_further_averages_are_exported_to_subfolders(run_training, tmp_path):
    run_training(tmp_path, "--max_train_steps", "3", "--ema_warmup", "false", "--ema_decay", "0.9", "0.5")
    kept = tmp_path / "checkpoints" / "step-000000003"
    for folder, decay in [(tmp_path, 0.9), (tmp_path / "ema-0.5", 0.5)]:
        exported = DDPMPipeline.from_pretrained(folder).unet.state_dict()
        average = load_file(kept / f"ema-{decay}.safetensors")
        assert all(torch.equal(exported[name], average[name]) for name in average)
    assert not torch.equal(average["conv_out.weight"], load_file(kept / "ema-0.9.safetensors")["conv_out.weight"])


@pytest.fixture(scope="module")
def sample():
    return load_script("sample").main


def arrays(folder):
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("[0-9]*.png"))]


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim", "dpmsolver++"])
def test_image_i_of_seed_does_not_depend_on_batch(sample, trained, tmp_path, scheduler):
    common = ["--model", str(trained), "--num_inference_steps", "4", "--scheduler", scheduler]
    sample([*common, "--num_images", "5", "--output", str(tmp_path / "a")])
    sample([*common, "--num_images", "3", "--batch_size", "2", "--output", str(tmp_path / "b")])
    five, three = arrays(tmp_path / "a"), arrays(tmp_path / "b")
    assert len(five) == 5 and len(three) == 3
    np.testing.assert_array_equal(five[:3], three)
    assert Image.open(tmp_path / "a" / "grid.png").mode == "L"
    assert len({image.tobytes() for image in five}) == 5


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
def test_compiled_network_samples_same_images(sample, trained, tmp_path):
    common = ["--model", str(trained), "--num_inference_steps", "2", "--num_images", "3", "--batch_size", "2"]
    sample([*common, "--compile", "true", "--output", str(tmp_path / "compiled")])
    sample([*common, "--output", str(tmp_path / "plain")])
    compiled, plain = (np.stack(arrays(tmp_path / name)).astype(int) for name in ("compiled", "plain"))
    assert np.abs(compiled - plain).max() <= 1


def test_samples_of_other_seeds_differ(sample, trained, tmp_path):
    for seed in ("0", "1"):
        sample(["--model", str(trained), "--num_inference_steps", "2", "--num_images", "1", "--seed", seed,
                "--output", str(tmp_path / seed)])  # fmt: skip
    assert (tmp_path / "0" / "00000.png").read_bytes() != (tmp_path / "1" / "00000.png").read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model nowhere/at/all --output x", "model 'nowhere/at/all' cannot be loaded"),
        ("--model . --output x --num_images 0", "--num_images 0: expected at least 1"),
        ("--model . --output x --scheduler heun", "--scheduler heun: expected one of ddpm, ddim, "),
        ("--model . --output x --eta 1", "--eta 1.0: expected 0 with --scheduler ddpm"),
        ("--output x", "--model is missing; expected folder or Hub id"),
        ("--model . --output x --steps 4", "unknown option --steps"),
    ],
)
def test_errors_of_sampling_are_one_line(sample, words, message):
    with pytest.raises(ValueError, match=message) as caught:
        sample(words.split())
    assert "\n" not in str(caught.value)


def test_invalid_value_is_one_line_and_exit_code_2(capsys, monkeypatch):
    def main(argv):
        raise ValueError("--size 3: expected 4")

    monkeypatch.setattr(sys, "argv", ["/somewhere/train.py"])
    with pytest.raises(SystemExit) as caught:
        run_script(main)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "train.py: error: --size 3: expected 4\n"


def test_signal_prints_one_line_and_sets_exit_code(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/sample.py"])
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        with pytest.raises(SystemExit) as caught:
            run_script(lambda argv: signal.raise_signal(signal.SIGTERM))
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
            signal.signal(number, handler)
    assert caught.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "sample.py: stopped by SIGTERM\n"


def test_launched_process_uses_its_share_of_cores(monkeypatch):
    # accelerate launch sets OMP_NUM_THREADS=1 even for a single process.
    before = torch.get_num_threads()
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(6)), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    try:
        use_own_cores()
        assert torch.get_num_threads() == before  # without a launcher, the variable was set by the user
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        use_own_cores()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_bad_image_stops_training_before_anything_is_written(run_training, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"^row 0 \(.*a.png\): not an image"):
        run_training(tmp_path / "run", "--dataset", str(tmp_path / "images"))
    assert not any(path.name != ".lock" for path in (tmp_path / "run").iterdir())


class ByHand:
    """Expected losses, bounds and images of a network whose output is zero, computed from the formulas in float64.

    A new network outputs zero before its first training step.
    """

    def __init__(self, schedule, prediction, variance, last=0.999, zero_snr=False):
        ends = np.linspace(0.005, last, 20), np.linspace(0.005**0.5, last**0.5, 20) ** 2
        u = np.cos((np.linspace(0, 1, 21) + 0.008) / 1.008 * np.pi / 2) ** 2
        cosine = np.minimum(1 - u[1:] / u[:-1], 0.999)
        logistic = 0.005 + (last - 0.005) / (1 + np.exp(-np.linspace(-6, 6, 20)))
        named = {
            "squaredcos": cosine,
            "linear": ends[0],
            "quad": ends[1],
            "scaled_linear": ends[1],
            "sigmoid": logistic,
        }
        self.bars = np.cumprod(1 - named.get(schedule, np.full(20, last)))
        if zero_snr:
            roots = np.sqrt(self.bars)
            self.bars = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
        self.prediction, self.variance = prediction, variance

    def x_start(self, x_t, t):
        bar, before = self.bars[t], self.bars[t - 1] if t else 1.0
        if self.prediction == "mean":  # 0 = c_1 x_0 + c_2 x_t
            beta = 1 - bar / before
            return -np.sqrt(bar / before) * (1 - before) / (np.sqrt(before) * beta) * x_t
        return {"epsilon": x_t / np.sqrt(bar) if bar else x_t, "sample": 0 * x_t, "v_prediction": np.sqrt(bar) * x_t}[
            self.prediction
        ]

    @staticmethod
    def posterior(bar, before):
        """Return the variance of q(x_{t-1} | x_t, x_0), and the coefficient of x_0 in its mean."""
        beta = 1 - bar / before
        return beta * (1 - before) / (1 - bar), np.sqrt(before) * beta / (1 - bar)

    def reverse(self, x_start, x_t, bar, before, least):
        """Return mean and variance of p(x_{t-1} | x_t); `least` replaces a variance of zero."""
        beta = 1 - bar / before
        mean = np.sqrt(before) * beta / (1 - bar) * x_start + np.sqrt(bar / before) * (1 - before) / (1 - bar) * x_t
        small = beta * (1 - before) / (1 - bar) or least
        large = beta if before < 1 else least
        return mean, {
            "fixed_small": small, "fixed_large": large, "learned": 1.0, "learned_range": np.sqrt(small * beta),
        }[self.variance]  # fmt: skip

    def bound(self, x0, x_t, t, clip):
        """Return the term of the bound at t, in nats per dimension."""
        bar, before = self.bars[t], self.bars[t - 1] if t else 1.0
        first, second = 1 - self.bars[:2]
        least = (second - first) / (1 - first) * first / second  # the posterior variance at the second step
        x_start = self.x_start(x_t, t)
        mean, variance = self.reverse(np.clip(x_start, -1, 1) if clip else x_start, x_t, bar, before, least)
        mean = 0 * x_t if self.prediction == "mean" else mean  # the output itself, which clipping does not change
        if t == 0:
            lower, upper = (cdf((x0 - mean + half) / np.sqrt(variance)) for half in (-1 / 16, 1 / 16))
            lower, upper = np.where(x0 < -0.99, 0, lower), np.where(x0 > 0.99, 1, upper)
            return -np.log(np.maximum(upper - lower, 1e-12)).mean()
        beta = 1 - bar / before
        true = np.sqrt(before) * beta / (1 - bar) * x0 + np.sqrt(bar / before) * (1 - before) / (1 - bar) * x_t
        spread = beta * (1 - before) / (1 - bar)
        return 0.5 * (np.log(variance / spread) - 1 + (spread + (true - mean) ** 2) / variance).mean()

    def loss(self, objective, x0, t, noise):
        bar, before = self.bars[t], self.bars[t - 1] if t else 1.0
        x_t = np.sqrt(bar) * x0 + np.sqrt(1 - bar) * noise
        beta = 1 - bar / before
        target = {
            "epsilon": noise,
            "sample": x0,
            "v_prediction": np.sqrt(bar) * noise - np.sqrt(1 - bar) * x0,
            "mean": np.sqrt(before) * beta / (1 - bar) * x0 + np.sqrt(bar / before) * (1 - before) / (1 - bar) * x_t,
        }[self.prediction]
        simple = (target**2).mean()
        if objective == "min_snr":  # of v
            snr = bar / (1 - bar)
            return simple * min(snr, 5) / (snr + 1)
        bound = 20 * self.bound(x0, x_t, t, clip=False) if objective != "simple" else 0.0
        return {"simple": simple, "vlb": bound, "hybrid": simple + 0.001 * bound / np.log(2)}[objective]

    def image(self, source):
        """Return an image sampled in five steps, with Algorithm 2 on a subset of the timesteps."""
        x_t = torch.randn(1, 8, 8, generator=source).double().numpy()
        times = [19, 15, 11, 7, 3]
        for t, to in zip(times, [*times[1:], None], strict=True):
            before = 1.0 if to is None else self.bars[to]
            x_start = np.clip(self.x_start(x_t, t), -1, 1)
            mean, variance = self.reverse(x_start, x_t, self.bars[t], before, 1.0)
            if self.variance == "learned":  # the variance of a longer step for a variance of 1 in a single step
                spread, factor = self.posterior(self.bars[t], self.bars[t - 1])
                of_pixels = np.clip((1 - spread) / factor**2, 0, 1)
                spread, factor = self.posterior(self.bars[t], before)
                variance = spread + factor**2 * of_pixels
            noise = torch.randn(1, 8, 8, generator=source).double().numpy() if to is not None else 0
            x_t = mean + np.sqrt(variance) * noise
        return (255 * np.clip(x_t / 2 + 0.5, 0, 1)).round()[0]


def cdf(z):
    return 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


def signed(digits):
    """Return images of 17 gray levels in [-1, 1]."""
    return np.round(digits.double().numpy() * 16 / 255) / 8 - 1


VARIANTS = {
    "image": (
        "--prediction_type sample --variance_type fixed_large",
        "simple",
        ("squaredcos", "sample", "fixed_large"),
    ),
    "posterior mean": ("--prediction_type mean --beta_schedule quad", "simple", ("quad", "mean", "fixed_small")),
    "v, zero terminal SNR": (
        "--prediction_type v_prediction --rescale_betas_zero_snr true --objective min_snr",
        "min_snr",
        ("squaredcos", "v_prediction", "fixed_small", 0.999, True),
    ),
    "bound": (
        "--objective vlb --variance_type fixed_small --beta_schedule linear",
        "vlb",
        ("linear", "epsilon", "fixed_small"),
    ),
    "learned": (
        "--objective vlb --variance_type learned --beta_schedule const --beta_end 0.4",
        "vlb",
        ("const", "epsilon", "learned", 0.4),
    ),
    "learned mean": (
        "--objective hybrid --variance_type learned --prediction_type mean --beta_schedule scaled_linear",
        "hybrid",
        ("scaled_linear", "mean", "learned"),
    ),
    "learned range": (
        "--objective hybrid --variance_type learned_range --beta_schedule sigmoid",
        "hybrid",
        ("sigmoid", "epsilon", "learned_range"),
    ),
}


@pytest.mark.parametrize(("words", "objective", "process"), VARIANTS.values(), ids=VARIANTS)
def test_each_variant_trains_samples_and_evaluates(run_training, sample, tmp_path, words, objective, process):
    # Losses, samples and the bound are compared with a network whose output is zero: no flag may be ignored.
    still = ["--learning_rate", "1e-30", "--num_train_timesteps", "20", "--log_steps", "1"]
    run_training(tmp_path, "--max_train_steps", "2", *still, *words.split())
    by_hand, model = ByHand(*process), ["--model", str(tmp_path)]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    digits = load_images(DataConfig("digits", resolution=[8], channels=1))
    for step, line in enumerate(lines):
        draws, chosen = draw(0, step, range(8), (1, 8, 8), 20, "cpu"), batch_indices(0, step, 8, len(digits))
        x0 = signed(digits[chosen])
        rows = zip(x0, draws.t.tolist(), draws.noise.double().numpy(), strict=True)
        expected = np.mean([by_hand.loss(objective, *row) for row in rows])
        assert line["loss"] == pytest.approx(expected, rel=1e-4)

    sample([*model, "--num_images", "2", "--num_inference_steps", "5", "--output", str(tmp_path / "out")])
    for i, image in enumerate(arrays(tmp_path / "out")):
        expected = by_hand.image(generator(0, SAMPLES, i))
        assert np.abs(image - expected).max() <= 1

    results = tmp_path / "results.json"
    load_script("evaluate").main([*model, "--dataset", "digits", "--num_images", "3", "--output", str(results)])
    held_out, terms = load_images(DataConfig("digits", split="test", resolution=[8], channels=1)), np.zeros(20)
    for index in choose(len(held_out), 3, METRIC_SEED):
        x0 = signed(held_out[torch.tensor([index])])[0]
        for t, bar in enumerate(by_hand.bars):
            keys = (torch.tensor([value], dtype=torch.int32) for value in (index, t))
            noise = normal_noise(hashed_keys(derived_seed(0, BOUND_NOISE), *keys), (1, 8, 8))[0].double().numpy()
            terms[t] += by_hand.bound(x0, np.sqrt(bar) * x0 + np.sqrt(1 - bar) * noise, t, clip=True) / 3 / np.log(2)
    measured = json.loads(results.read_text())["nll"]["terms_bpd"]
    np.testing.assert_allclose(measured[1:], terms[1:], rtol=1e-3, atol=1e-5)
    assert measured[0] == pytest.approx(terms[0], rel=0.02)  # float32 rounds very small probabilities


def test_sample_grids_are_written_at_checkpoints(run_training, tmp_path, monkeypatch):
    grids = []
    save = callbacks.save_picture
    monkeypatch.setattr(
        callbacks, "save_picture", lambda grid, path: [grids.append((path.name, grid)), save(grid, path)]
    )
    words = ["--max_train_steps", "4", "--checkpointing_steps", "2", "--sample_at_checkpoints", "true"]
    run_training(tmp_path, *words, "--class_column", "label", "--learning_rate", "3e-3")
    kept = [f"step-{step:09d}.png" for step in (2, 4)]
    assert [name for name, _ in grids] == ["samples.png", kept[0], "samples.png", kept[1]]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == kept
    with Image.open(tmp_path / "samples.gif") as animation:
        assert animation.n_frames == 2
    # Images 0 to 3 of the seed, with classes in turn and the average of that step, upscaled 8 times.
    pipe = DDPMPipeline.from_pretrained(tmp_path)
    sampling = Sampling(0, 2, class_labels=["0", "1", "2", "3"])
    for step, (_, grid) in zip((2, 2, 4, 4), grids, strict=True):
        pipe.unet.load_state_dict(load_file(tmp_path / f"checkpoints/step-{step:09d}/ema-0.995.safetensors"))
        images = [image[0].numpy() for _, image in generate_images(pipe, range(4), sampling, batch_size=4)]
        row = np.asarray(grid)[-70:-6:8]  # one row, with a column and a gap for each class that has an image
        tiles = [row[:, 6 + 70 * column :: 8][:, :8] for column in range(4)]
        np.testing.assert_array_equal(tiles, images)
    # A resumed run keeps the grids of earlier steps, and deletes the grids of later steps.
    run_training(tmp_path, *words, "--max_train_steps", "6", "--class_column", "label", "--learning_rate", "3e-3")
    with Image.open(tmp_path / "samples.gif") as animation:
        assert animation.n_frames == 3
    # With at most two of three grids, the animation has the first and the last one.
    monkeypatch.setattr(callbacks, "MOST_FRAMES", 2)
    run_training(tmp_path, *words, "--max_train_steps", "6", "--class_column", "label", "--learning_rate", "3e-3")
    with Image.open(tmp_path / "samples.gif") as animation:
        assert animation.n_frames == 2
    resumed = ["--resume", str(tmp_path / "checkpoints" / "step-000000004")]
    run_training(tmp_path, *words, "--class_column", "label", "--learning_rate", "3e-3", *resumed)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == kept


def test_incompatible_options_are_rejected(run_training, tmp_path):
    with pytest.raises(ValueError, match="objective='simple': not supported with variance_type='learned'"):
        run_training(tmp_path, "--variance_type", "learned")
    with pytest.raises(
        ValueError, match="--rescale_betas_zero_snr true with --prediction_type epsilon: .*; expected --pr"
    ):
        run_training(tmp_path, "--rescale_betas_zero_snr", "true")


@pytest.mark.slow
def test_command_line_end_to_end(tmp_path):
    def script(name, *words):
        return subprocess.run(
            [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *words],
            capture_output=True, text=True, env={**__import__("os").environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    run = script("train", *TINY_RUN, "--max_train_steps", "4", "--output_dir", str(tmp_path / "run"))
    assert run.returncode == 0, run.stderr
    assert re.search(r"loss \d+\.\d+, \d+ images/s", run.stderr)  # the progress bar
    wrong = script("train", "--preset", "digits", "--resolution", "9")
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1].startswith("train.py: error: --resolution 9: ")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("kept", [0, 20, -1])
def test_damaged_image_is_written_again(sample, trained, tmp_path, kept):
    words = ["--model", str(trained), "--output", str(tmp_path), "--num_images", "3", "--num_inference_steps", "2"]
    assert sample(words) == 0
    file = tmp_path / "00001.png"
    content = file.read_bytes()
    file.write_bytes(content[:kept] if kept >= 0 else (tmp_path / "00002.png").read_bytes())
    assert sample(words) == 0
    assert file.read_bytes() == content


def test_unwritable_output_is_rejected_before_sampling(sample, trained, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--output .*file/out: folder is not writable"):
        sample(["--model", str(trained), "--output", str(tmp_path / "file" / "out")])
