import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from benchmarks import run as benchmark_run
from benchmarks import stock
from benchmarks.__main__ import main
from benchmarks.equality import check_equal, exclusion_reason
from benchmarks.measure import Workload, measure_rates, peak_memory
from benchmarks.options import grown, growth_values, parse_benchmark
from benchmarks.ours import Ours
from benchmarks.setting import Setting
from benchmarks.stock import Stock
from hf_ddpm.images import to_signed
from hf_ddpm.training.dry_run import count_flops
from tests.benchmarks.conftest import WORDS, rows_by


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_sampling_in_few_steps_is_compared(benchmark, variance):
    words = ("--tasks", "sampling", "--against", "diffusers", "--variance_type", variance, "--beta_schedule", "linear")
    words += ("--num_inference_steps", "20")
    report, _ = benchmark(*words)
    assert rows_by(report)["sampling", "diffusers"]["error"] is None


def test_report_contains_rows_checks_and_versions(benchmark):
    report, printed = benchmark("--tasks", "forward,train_step,training,sampling,data,nll", "--against", "diffusers")
    rows = rows_by(report)
    both = ("forward", "train_step", "training", "sampling", "sampling_1", "data_memory", "data_jpeg")
    expected = {(task, subject) for task in both for subject in ("hf_ddpm", "diffusers")}
    assert set(rows) == expected | {("nll", "hf_ddpm"), ("nll", "hf_ddpm, forward alone")}
    for (_, subject), row in rows.items():
        assert row["error"] is None
        assert len(row["seconds"]["rounds"]) == 1 and row["seconds"]["median"] > 0
        assert subject != "hf_ddpm" or row["beside_ours"] == 1
    forward, sampling = rows["forward", "hf_ddpm"], rows["sampling", "hf_ddpm"]
    assert forward["images"] == sampling["images"] == 8 and rows["sampling_1", "diffusers"]["images"] == 1
    assert forward["of_matmul"] == pytest.approx(forward["flops_per_second"] / report["rates"]["no"]["matmul"])
    operations = [row["flops_per_second"] * row["seconds"]["median"] for row in (forward, sampling)]
    assert operations[1] == pytest.approx(2 * operations[0])  # a chain has two steps
    assert rows["data_memory", "hf_ddpm"]["flops_per_second"] is None
    (check,) = report["equality"]
    assert check["subject"] == "diffusers" and all(entry["equal"] for entry in check["outputs"].values())
    made = report["made_by"]
    assert {"versions", "revision", "device", "date", "threads", "processes"} <= made.keys()
    assert made["threads"] == 1 and made["versions"]["torch"] == torch.__version__
    assert report["options"]["rounds"] == 1 and report["options"]["config"]["train_batch_size"] == 8
    assert printed.count("| diffusers |") == 7
    assert "nll: hf_ddpm " in printed and "(1.00), hf_ddpm, forward alone " in printed  # printed after each task


def test_missing_library_is_reported_in_its_row(benchmark, monkeypatch):
    monkeypatch.setitem(sys.modules, "denoising_diffusion_pytorch", None)
    report, printed = benchmark("--tasks", "forward,data", "--against", "denoising-diffusion-pytorch")
    absent = [row for row in report["rows"] if row["subject"] == "denoising-diffusion-pytorch"]
    assert [row["task"] for row in absent] == ["forward"]
    assert absent[0]["error"].startswith("not installed: ")
    assert "| forward | denoising-diffusion-pytorch | not installed: " in printed


def test_others_are_also_timed_without_compilation(benchmark, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    monkeypatch.setattr(nn.Module, "compile", lambda network, **options: compiled.append(type(network)))
    monkeypatch.setitem(sys.modules, "denoising_diffusion_pytorch", None)
    report, _ = benchmark("--tasks", "forward,train_step,data", "--compile", "true")
    report["rows"] = [row for row in report["rows"] if "denoising" not in row["subject"]]
    subjects = ("hf_ddpm", "diffusers", "diffusers, not compiled")
    network = {(task, subject) for task in ("forward", "train_step") for subject in subjects}
    assert set(rows_by(report)) - network == {(t, s) for t in ("data_memory", "data_jpeg") for s in subjects[:2]}
    assert {row: rows_by(report)[row]["error"] for row in network} == dict.fromkeys(network)
    assert all(rows_by(report)[row]["beside_ours"] > 0 for row in network)
    assert [check["subject"] for check in report["equality"]] == list(subjects)
    assert set(compiled) == {Ours.network_class, Stock.network_class}


def test_failing_contender_is_reported_in_its_row(benchmark, monkeypatch):
    def fails(self):
        raise RuntimeError("no\nway")

    def fails_later(self):
        return [Workload(self.name, lambda: 1 / 0, 1, "pass")]

    monkeypatch.setattr(Stock, "forward", fails)
    monkeypatch.setattr(Ours, "data_memory", fails_later)
    report, _ = benchmark("--tasks", "forward,data", "--against", "diffusers")
    rows = rows_by(report)
    assert rows["forward", "diffusers"]["error"] == "RuntimeError: no way"
    assert rows["forward", "hf_ddpm"]["error"] is None
    assert rows["data_memory", "hf_ddpm"]["error"] == "ZeroDivisionError: division by zero"
    assert rows["data_memory", "diffusers"]["error"] is None
    assert rows["data_memory", "diffusers"]["beside_ours"] is None  # our task failed


def test_contenders_with_other_outputs_are_not_compared(setting, tmp_path, benchmark, monkeypatch):
    alike = check_equal(Ours(setting), Stock(setting))
    assert exclusion_reason(alike) is None and alike["network"]["difference"] < 1e-5
    other = Setting(setting.options, setting.config, tmp_path / "other")
    other.weights["conv_out.bias"] += 0.01
    different = check_equal(Ours(setting), Stock(other))
    assert not any(check["equal"] for check in different.values())
    assert exclusion_reason(different).startswith("not compared: network: difference ")

    class Lossy(Stock):
        def plain_network(self):
            network = super().plain_network()
            network.conv_in.weight.requires_grad_(False)  # simulates a compiler that drops a gradient
            return network

    lossy = check_equal(Ours(setting), Lossy(setting))
    assert [name for name, check in lossy.items() if not check["equal"]] == ["gradients"]

    def other_network(self):
        network = Stock.network_class(**self.setting.config.unet())
        network.load_state_dict(self.setting.weights)
        nn.init.zeros_(network.conv_in.weight)
        return network

    monkeypatch.setattr(Stock, "plain_network", other_network)
    rows = rows_by(benchmark("--tasks", "forward,data", "--against", "diffusers")[0])
    assert rows["forward", "diffusers"]["error"].startswith("not compared")
    assert rows["forward", "hf_ddpm"]["error"] is rows["data_memory", "diffusers"]["error"] is None


def test_growth_adds_row_per_value_and_curve(benchmark, tmp_path):
    words = ("--tasks", "forward", "--against", "none", "--growth", "batch", "--growth_values", "2", "3")
    report, printed = benchmark(*words)
    assert [(row["at"], row["images"]) for row in report["rows"]] == [(2, 2), (3, 3)]
    assert "| batch | task |" in printed
    assert (tmp_path / "new" / "report_forward.png").exists()


def test_growth_changes_options():
    options, config = parse_benchmark([*WORDS, "--growth", "resolution"])
    assert growth_values(options, config) == [8, 16, 32]
    larger = grown(config, "resolution", 32)
    assert larger.data.size == (32, 32) and larger.attends == config.attends == [False, True]
    assert grown(config, "batch", 5).training.train_batch_size == 5
    longer = grown(config, "steps", 30)
    assert longer.diffusion.num_train_timesteps == 30 and longer.training.num_inference_steps is None
    tall = grown(replace(config, data=replace(config.data, resolution=[16, 8])), "resolution", 16)
    assert tall.data.size == (32, 16)


def test_growth_over_processes_joins_reports_of_launches(tmp_path, monkeypatch, capsys):
    script = tmp_path / "script.py"
    monkeypatch.setattr(benchmark_run, "PROGRAM", script)
    script.write_text(
        "import json, os, sys\n"
        "if os.environ['WORLD_SIZE'] == '2': sys.exit('Error: two are too many')\n"
        "words = sys.argv[1:]\n"
        "assert words[words.index('--growth', 2) + 1] == 'none'\n"
        "json.dump({'options': {'json': 'x'}, 'rows': [{'task': 'training', 'subject': 'hf_ddpm', 'error': 'e'}]},\n"
        "          open(words[-1], 'w'))\n"
    )
    argv = ["--growth", "processes", "--tasks", "training"]
    options, _ = parse_benchmark(argv)
    with tqdm(total=2) as bar:
        report = benchmark_run.run_processes(argv, options, [1, 2], bar)
    first, second = report["rows"]
    assert first == {"task": "training", "subject": "hf_ddpm", "error": "e", "at": 1}
    assert second["at"] == 2 and "two are too many" in second["error"]
    assert capsys.readouterr().err.count("training: hf_ddpm failed\n") == 2
    assert report["options"]["growth"] == "processes" and report["options"]["json"] == "benchmark.json"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "forward,dance"], "--tasks forward,dance: expected any of forward, "),
        (["--tasks", ","], "--tasks ,: expected any of forward, "),
        (["--against", "nobody"], "--against nobody: expected any of diffusers, "),
        (["--rounds", "0"], "--rounds 0: expected at least 1"),
        (["--growth", "processes"], "expected train_step or training with --growth processes"),
        (["--json", "table.md"], "--json table.md: expected a file that ends in .json"),
        (["--round", "3"], "unknown option --round"),
    ],
)
def test_invalid_option_is_one_line(words, message):
    with pytest.raises(ValueError, match="expected|unknown") as error:
        parse_benchmark(words)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_default_preset_is_digits():
    options, config = parse_benchmark([])
    assert config.data.dataset == "digits" and options.others == ["diffusers", "denoising-diffusion-pytorch"]
    assert parse_benchmark(["--preset", "cifar10", "--class_column", "auto"])[1].data.class_column is None


def test_operations_are_counted_including_attention():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 4, 3, padding=1)

        def forward(self, x, t):
            h = self.conv(x).flatten(2).transpose(1, 2)[:, None].contiguous()
            return nn.functional.scaled_dot_product_attention(h, h, h)

    forward, both = count_flops(Attention(), torch.randn(3, 2, 5, 5), torch.zeros(3))
    convolution, attention = 2 * 25 * 9 * 2 * 4, 2 * (2 * 25 * 25 * 4)
    assert forward == convolution + attention
    assert both == 2 * convolution + 3 * attention  # the input needs no gradient


def test_rates_and_peak_memory_are_measured():
    rates = measure_rates(torch.device("cpu"), torch.float32)
    assert rates.keys() == {"matmul", "convolution"} and min(rates.values()) > 0
    with peak_memory(torch.device("cpu")) as peak:
        held = np.ones(2**23)  # 64 MiB
        del held
        assert 60 * 2**20 < peak() < 100 * 2**20


def test_help_imports_no_slow_packages():
    code = (
        "import sys\nfrom benchmarks.__main__ import main\n"
        "try: main(['--help'])\nexcept SystemExit: print([m for m in ('torch', 'diffusers') if m in sys.modules])"
    )
    output = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert "--growth" in output and output.splitlines()[-1] == "[]"


def test_script_runs_from_any_folder(tmp_path):
    script = benchmark_run.PROGRAM
    words, elsewhere = ["--round", "3"], {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, script, *words], cwd=tmp_path, env=elsewhere, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("benchmarks: error: unknown option --round") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_growth_over_processes_launches_script(benchmark):
    words = ("--tasks", "train_step", "--against", "none", "--growth", "processes", "--growth_values", "2")
    (row,) = benchmark(*words)[0]["rows"]
    assert (row["at"], row["images"], row["error"]) == (2, 16, None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hf_ddpm", "diffusers"])
def test_memory_of_task_is_measured_in_its_own_process(name, setting):
    entry = benchmark_run.CONTENDERS[name](setting).memory("train_step")
    assert entry.keys() == {"memory_bytes"} and 2**20 < entry["memory_bytes"] < 2**30


def test_imports_are_timed_in_new_processes(benchmark, monkeypatch):
    monkeypatch.setattr(Ours, "statement", "from types import SimpleNamespace as DDPMPipeline")
    report, printed = benchmark("--tasks", "import", "--against", "none")
    imported, loaded = report["rows"]
    assert imported["task"] == "import_time" and imported["images_per_second"] is None and imported["error"] is None
    # The stand-in for the pipeline cannot load a model, and its row contains the error.
    assert loaded["task"] == "load_time" and "has no attribute 'from_pretrained'" in loaded["error"]


def test_stand_in_matches_torchvision():
    transforms = stock.STAND_IN
    pixels = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3)
    image = Image.fromarray(pixels)
    unit = transforms.ToTensor()(image)
    assert unit.shape == (3, 6, 4) and unit[2, 5, 1] == pixels[5, 1, 2] / 255
    signed = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])(image)
    torch.testing.assert_close(signed, to_signed(torch.from_numpy(pixels).permute(2, 0, 1)))
    assert transforms.Resize(4)(image) is image  # the shorter side already has this length
    assert transforms.Resize(2)(image).size == (2, 3) and transforms.Resize((2, 8))(image).size == (8, 2)
    middle = transforms.CenterCrop(2)(image)
    np.testing.assert_array_equal(np.asarray(middle), pixels[2:4, 1:3])
    seen = {transforms.RandomHorizontalFlip()(image).tobytes() for _ in range(40)}
    assert seen == {pixels.tobytes(), pixels[:, ::-1].tobytes()}


def test_torchvision_is_replaced_only_if_missing(monkeypatch):
    monkeypatch.setattr(stock, "find_spec", lambda name: None)
    with stock.importable_torchvision():
        from torchvision import transforms

        assert transforms is stock.STAND_IN
    monkeypatch.setattr(stock, "find_spec", lambda name: object())
    before = sys.modules.get("torchvision")
    with stock.importable_torchvision():
        assert sys.modules.get("torchvision") is before


def test_without_check_nothing_is_compared(benchmark, monkeypatch):
    monkeypatch.setattr("benchmarks.run.compare", lambda contenders, tasks: 1 / 0)
    report, _ = benchmark("--tasks", "forward", "--against", "diffusers", "--check", "false")
    assert report["equality"] == [] and rows_by(report)["forward", "diffusers"]["error"] is None


def test_images_of_folder_need_no_internet(benchmark, tmp_path):
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    for i in range(8):
        Image.new("L", (8, 8), 30 * i).save(tmp_path / f"{i}.png")
    words = ("--dataset", str(tmp_path), "--channels", "1", "--resolution", "8", "--tasks", "training")
    report, _ = benchmark(*words, "--against", "diffusers")
    assert {subject: row["error"] for (_, subject), row in rows_by(report).items()} == {
        "hf_ddpm": None,
        "diffusers": None,
    }


@pytest.mark.parametrize("option", ["json", "profile"])
def test_result_folders_are_checked_before_timing(tmp_path, monkeypatch, option):
    monkeypatch.setattr(
        benchmark_run, "run_benchmark", lambda *arguments: pytest.fail("timed before the folder was checked")
    )
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"^--{option} .*: folder is not writable"):
        main(["--json", str(tmp_path / "a.json"), f"--{option}", str(tmp_path / "file" / "b.json")])
