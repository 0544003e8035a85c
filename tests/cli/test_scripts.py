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
from hf_ddpm.config import parse_config
from hf_ddpm.utils.launch import run_script, use_own_cores
from tests.conftest import TINY_RUN, load_script

ROOT = Path(__file__).parents[2]


def test_training_leaves_all_that_it_promises(trained):
    names = {path.name for path in trained.iterdir()} - {".lock"}
    assert names == {
        "checkpoints", "config.yaml", "metrics.jsonl", "model_index.json", "samples.png", "scheduler", "status.json",
        "unet", "README.md", "loss.png", "export.json",
    }  # fmt: skip
    assert type(DDPMPipeline.from_pretrained(trained).unet) is UNet2DModel
    assert type(diffusers.DDPMPipeline.from_pretrained(trained).unet) is diffusers.UNet2DModel
    assert parse_config(["--config", str(trained / "config.yaml")]).training.max_train_steps == 4
    assert Image.open(trained / "samples.png").size == (2 * 65 - 1, 2 * 65 - 1)


def test_the_export_is_the_average(trained):
    exported = load_file(trained / "unet" / "diffusion_pytorch_model.safetensors")
    average = load_file(trained / "checkpoints" / "step-000000004" / "ema-0.995.safetensors")
    assert all(torch.equal(exported[name], average[name]) for name in average)


def test_further_averages_are_exported_beside_the_first(run_training, tmp_path):
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


def pictures(folder):
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("[0-9]*.png"))]


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim", "dpmsolver++"])
def test_image_i_of_a_seed_is_the_same_in_any_batch(sample, trained, tmp_path, scheduler):
    common = ["--model", str(trained), "--num_inference_steps", "4", "--scheduler", scheduler]
    sample([*common, "--num_images", "5", "--output", str(tmp_path / "a")])
    sample([*common, "--num_images", "3", "--batch_size", "2", "--output", str(tmp_path / "b")])
    five, three = pictures(tmp_path / "a"), pictures(tmp_path / "b")
    assert len(five) == 5 and len(three) == 3
    np.testing.assert_array_equal(five[:3], three)
    assert Image.open(tmp_path / "a" / "grid.png").mode == "L"
    assert len({picture.tobytes() for picture in five}) == 5


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="nothing compiles here")
def test_a_compiled_network_makes_the_same_images(sample, trained, tmp_path):
    common = ["--model", str(trained), "--num_inference_steps", "2", "--num_images", "3", "--batch_size", "2"]
    sample([*common, "--compile", "true", "--output", str(tmp_path / "compiled")])
    sample([*common, "--output", str(tmp_path / "plain")])
    compiled, plain = (np.stack(pictures(tmp_path / name)).astype(int) for name in ("compiled", "plain"))
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
        ("--model . --output x --num_images 0", "num_images=0 is not allowed: at least 1"),
        ("--model . --output x --scheduler heun", "argument --scheduler: invalid choice: 'heun'"),
        ("--model . --output x --eta 1", "eta=1.0 is not allowed with scheduler=ddpm: only with ddim"),
        ("--output x", "the following arguments are required: --model"),
        ("--model . --output x --steps 4", "unknown option --steps"),
    ],
)
def test_wrong_requests_for_samples_are_one_line(sample, words, message):
    with pytest.raises(ValueError, match=message) as caught:
        sample(words.split())
    assert "\n" not in str(caught.value)


def test_a_wrong_input_is_one_line_and_exit_code_2(capsys, monkeypatch):
    def main(argv):
        raise ValueError("size=3 is not allowed: 4 is")

    monkeypatch.setattr(sys, "argv", ["/somewhere/train.py"])
    with pytest.raises(SystemExit) as caught:
        run_script(main)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "train.py: error: size=3 is not allowed: 4 is\n"


def test_a_signal_is_one_line_and_its_exit_code(capsys, monkeypatch):
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


def test_a_launched_process_takes_its_share_of_the_cores(monkeypatch):
    # accelerate launch sets OMP_NUM_THREADS=1 even where one process has the machine to itself.
    before = torch.get_num_threads()
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(6)), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    try:
        use_own_cores()
        assert torch.get_num_threads() == before  # not launched: the user's own wish
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        use_own_cores()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_bad_image_stops_training_before_anything_is_written(run_training, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"image in row 0 \(.*a.png\) is not usable"):
        run_training(tmp_path / "run", "--dataset", str(tmp_path / "images"))
    assert not any(path.name != ".lock" for path in (tmp_path / "run").iterdir())


VARIANTS = {
    "image": "--prediction_type sample --variance_type fixed_small",
    "posterior mean": "--prediction_type mean --beta_schedule quad",
    "v, zero terminal SNR": "--prediction_type v_prediction --rescale_betas_zero_snr true --objective min_snr",
    "bound": "--objective vlb --variance_type fixed_small --beta_schedule linear",
    "learned": "--objective vlb --variance_type learned --beta_schedule const --beta_end 0.4",
    "learned mean": "--objective hybrid --variance_type learned --prediction_type mean --beta_schedule scaled_linear",
    "learned range": "--objective hybrid --variance_type learned_range --beta_schedule sigmoid",
}


@pytest.mark.parametrize("words", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_trains_samples_and_evaluates_by_flag(run_training, sample, tmp_path, words):
    run_training(tmp_path, "--max_train_steps", "3", "--num_train_timesteps", "20", *words.split())
    model = ["--model", str(tmp_path)]
    sample([*model, "--num_images", "2", "--num_inference_steps", "5", "--output", str(tmp_path / "out")])
    assert len(pictures(tmp_path / "out")) == 2
    results = tmp_path / "results.json"
    load_script("evaluate").main([*model, "--dataset", "digits", "--num_images", "3", "--output", str(results)])
    assert np.isfinite(json.loads(results.read_text())["nll"]["total_bpd"])


def test_samples_can_be_drawn_at_checkpoints(run_training, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("hf_ddpm.cli.callbacks.save_picture", lambda picture, path: drawn.append(path))
    run_training(tmp_path, "--max_train_steps", "4", "--checkpointing_steps", "2", "--sample_at_checkpoints", "true")
    assert len(drawn) == 2  # at step 2 and at the end


def test_variants_that_make_no_sense_are_refused(run_training, tmp_path):
    with pytest.raises(ValueError, match="objective='simple' is not allowed with variance_type='learned'"):
        run_training(tmp_path, "--variance_type", "learned")
    with pytest.raises(ValueError, match="rescale_betas_zero_snr=True is not allowed with prediction_type='epsilon'"):
        run_training(tmp_path, "--rescale_betas_zero_snr", "true")


@pytest.mark.slow
def test_the_command_line_from_end_to_end(tmp_path):
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
    assert wrong.stderr.splitlines()[-1].startswith("train.py: error: resolution=[9] is not allowed")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("kept", [0, 20, -1])
def test_a_damaged_picture_is_made_anew(sample, trained, tmp_path, kept):
    words = ["--model", str(trained), "--output", str(tmp_path), "--num_images", "3", "--num_inference_steps", "2"]
    assert sample(words) == 0
    file = tmp_path / "00001.png"
    content = file.read_bytes()
    file.write_bytes(content[:kept] if kept >= 0 else (tmp_path / "00002.png").read_bytes())
    assert sample(words) == 0
    assert file.read_bytes() == content


def test_an_output_that_cannot_be_written_is_refused_before_the_work(sample, trained, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="output: folder '.*file/out' cannot be written to"):
        sample(["--model", str(trained), "--output", str(tmp_path / "file" / "out")])
