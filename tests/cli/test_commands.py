import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_ddpm import cli
from hf_ddpm.config import PARTS, Config
from hf_ddpm.presets import preset_names
from tests.conftest import TINY_RUN

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "diffusers", "accelerate", "datasets", "gradio", "matplotlib"}


def end(*words):
    """Return the exit code, output, errors and heavy imports of a process that ends before its work starts."""
    code = (
        "import atexit, sys; from hf_ddpm.cli import main\n"
        f"atexit.register(lambda: print('\\nimported', *({HEAVY!r} & set(sys.modules))))\n"
        f"sys.argv = ['hf-ddpm', *{words!r}]; main()"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    output, _, imported = process.stdout.rpartition("\nimported")
    return process.returncode, output, process.stderr, imported.split()


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help_is_printed_without_slow_imports(command):
    code, output, errors, imported = end(*command.split(), "--help")
    assert (code, errors, imported) == (0, "", []) and output.startswith(f"usage: hf-ddpm {command}".rstrip())


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("train --num_epochs 3", "hf-ddpm train: error: unknown option --num_epochs: did you mean --num_train_epochs?"),
        ("train --dataset digits --dropout 1", "hf-ddpm train: error: --dropout 1.0: expected a value in [0, 1)"),
        ("sample --model m", "hf-ddpm sample: error: --output is missing; expected output folder"),
        ("evaluate --batch_size x", "hf-ddpm evaluate: error: --batch_size x: expected an integer"),
        ("push --model nowhere --hub_model_id a/b", "--model nowhere: expected an existing folder"),
        (
            "convert --from what",
            "hf-ddpm convert: error: --from what: expected one of ho2020, improved-diffusion, stock",
        ),
        ("reproduce step", "hf-ddpm reproduce: error: unknown command 'step': did you mean steps?"),
        ("reproduce steps --modle m", "hf-ddpm reproduce: error: unknown option --modle: did you mean --model?"),
        ("trian", "hf-ddpm: error: unknown command 'trian': did you mean train?"),
        (
            "frobnicate",
            "hf-ddpm: error: unknown command 'frobnicate': expected one of train, distill, sample, edit, evaluate",
        ),
    ],
)
def test_errors_for_invalid_arguments_are_one_line_without_slow_imports(words, error):
    code, output, errors, imported = end(*words.split())
    assert code == 2 and error in errors and errors.count("\n") == 1 and output == "" and imported == []


@pytest.mark.parametrize(("script", "command"), [("train", "train"), ("push_to_hub", "push"), ("space/app", "demo")])
def test_scripts_run_their_commands(script, command):
    process = subprocess.run(
        [sys.executable, f"scripts/{script}.py", "--nonsense", "1"], capture_output=True, text=True, cwd=ROOT
    )
    name = script.rpartition("/")[2]
    assert (process.returncode, process.stderr) == (2, f"{name}.py: error: unknown option --nonsense: see --help\n")
    assert f'run("{command}")' in (ROOT / "scripts" / f"{script}.py").read_text()


def test_commands_are_listed_with_one_line_each(capsys):
    for words in ([], ["--help"], ["-h"]):
        assert cli.list_commands(words) == 0
        lines = capsys.readouterr().out.splitlines()
        listed = dict(re.fullmatch(r"  (\w+) +(\S.*\.)", line).groups() for line in lines if line.startswith("  "))
        assert tuple(listed) == cli.COMMANDS


def test_presets_are_listed_with_one_line_each(capsys):
    assert importlib.import_module("hf_ddpm.cli.presets").main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines]
    assert names[:5] == ["preset", "digits", "small-32", "small-64", "cifar10"]  # by size
    assert {*names[1:]} == {*preset_names()}
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert rows["cifar10"] == ["32x32", "35.7M", "128", "7.3", "GiB", "800,000"]
    assert rows["small-32"] == ["32x32", "2.7M", "32", "0.5", "GiB", "auto"]


def test_presets_measures_time_per_step_with_measure(capsys, monkeypatch):
    presets = importlib.import_module("hf_ddpm.cli.presets")
    monkeypatch.setattr(presets, "preset_names", lambda: ["digits"])
    assert presets.main(["--measure", "true"]) == 0
    assert float(re.search(r"1,500, (\S+) s per step", capsys.readouterr().out)[1]) > 0


def help_of(command, capsys, *words):
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(f"hf_ddpm.cli.{command}").main([*words, "--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_help_of_training_has_groups_defaults_presets_and_examples(capsys):
    text = help_of("train", capsys)
    titles = re.findall(r"^(\w+): ", text, re.M)[1:]
    assert titles == ["Sources", "Data", "Model", "Process", "Training", "Evaluation", "Hub", "Distillation"]
    groups = dict(zip(titles, re.split(r"^\w+: .*:$", text, flags=re.M)[1:], strict=True))
    for title, part in zip(titles[1:], PARTS, strict=True):
        options = re.findall(r"^  --(\w+)", groups[title], re.M)
        assert options == [field.name for field in dataclasses.fields(part)]
    words = " ".join(text.split())
    for line in (
        "--max_train_steps N|auto optimizer steps; auto: 100 epochs, but at least 10,000 and at most 100,000 steps "
        "(default: 800,000, like the paper) --num",
        "--adam_beta1 X decay of Adam's first moment (default: 0.9)",
        "(default: 128 256 256 256)",
        "--ema_warmup [true|false] start with smaller decays: min(decay, (1 + step) / (10 + step)) (default: true)",
    ):
        assert line in words
    assert all(name in words.replace("- ", "-") for name in preset_names())
    assert "\nexamples:\n\n    hf-ddpm train --preset digits" in text


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_each_command_has_each_option_once_and_examples(command, capsys):
    text = help_of(command, capsys, *(["steps"] if command == "reproduce" else []))
    options = re.findall(r"^  (--\w+)", text, re.M)
    assert len(set(options)) == len(options)
    assert "default: None" not in text and not re.search(r"--\w+-\w+", text.partition("examples:")[0])
    whole = help_of(command, capsys)
    assert re.search(rf"examples:\n\n    (hf-ddpm {command}|accelerate launch -m hf_ddpm {command})", whole)


def test_required_options_are_in_usage_without_default(capsys):
    text = help_of("sample", capsys)
    assert text.startswith("usage: ") and "--model ... --output ... [--OPTION VALUE ...]\n" in text.splitlines(True)[0]
    assert "default" not in re.search(r"--model TEXT.*?--num_images", text, re.S)[0]


@pytest.mark.parametrize("command", ["status", "export"])
def test_first_argument_has_the_same_name_in_usage_options_and_errors(command, capsys):
    text = help_of(command, capsys)
    assert " RUN [--OPTION VALUE ...]\n" in text.splitlines(True)[0] and "--run" not in text
    assert re.search(r"^  RUN +folder of a run", text, re.M)
    with pytest.raises(ValueError, match="^RUN is missing; expected folder of a run"):
        importlib.import_module(f"hf_ddpm.cli.{command}").main([])


def test_help_of_distill_shows_neither_options_of_stages_that_are_fixed_nor_their_defaults(capsys):
    text = " ".join(help_of("distill", capsys).split())
    assert "--output_dir" not in text and "--prediction_type" in text and "--max_train_steps" in text
    own, _, stages = text.partition(" Data: ")
    assert "(default: " in own and "(default: " not in stages
    assert "--lr_schedule {constant,cosine,linear,polynomial}" in stages and "--value_range LOW HIGH " in stages


def test_help_of_training_limits_defaults_to_given_networks(capsys):
    assert "Defaults shown here apply only if --block_out_channels is given." in help_of("train", capsys)


@pytest.mark.slow
def test_all_launchers_start_same_run(tmp_path):
    accelerate = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    starts = {
        "script": [*accelerate, str(ROOT / "scripts" / "train.py")],
        "package": [*accelerate, "-m", "hf_ddpm", "train"],
        "torchrun": ["torch.distributed.run", "--nproc_per_node", "2", "-m", "hf_ddpm", "train"],
    }
    weights = {}
    for name, start in starts.items():
        words = [*start, *TINY_RUN, "--max_train_steps", "2", "--output_dir", str(tmp_path / name)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", *words], check=True, capture_output=True, env=environment)
        weights[name] = load_file(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors")
        assert json.loads((tmp_path / name / "status.json").read_text())["hardware"].startswith("2 x cpu")
    for name in ("package", "torchrun"):
        assert all(torch.equal(weights[name][key], value) for key, value in weights["script"].items())


def test_python_options_equal_command_line_options():
    options = {"preset": "digits", "resolution": (8, 16), "horizontal_flip": True, "eval_metrics": "", "seed": 3}
    config = Config.of(**options, image_column=None)
    assert config.data.size == (8, 16) and config.data.horizontal_flip is True and config.training.seed == 3
    assert config == Config.of(config=None, **options) and config != Config.of(preset="digits")
    with pytest.raises(ValueError, match=r"unknown option --lerning_rate: did you mean --learning_rate\?"):
        Config.of(preset="digits", lerning_rate=1)
