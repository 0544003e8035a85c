import re

import pytest
import torch
import yaml
from accelerate import Accelerator

from hf_ddpm import UNet2DModel
from hf_ddpm.cli.presets import preset_config
from hf_ddpm.config import EvaluationConfig, HubConfig, ModelConfig, TrainingConfig, default_options, parse_config
from hf_ddpm.presets import preset_names, preset_path
from hf_ddpm.training.memory import MemoryPlan
from hf_ddpm.utils.options import Auto

SMALL = ("small-32", "small-64")
# Options of runs without a preset, before automatic presets existed.
PAST = default_options() | {"dataset": "mine", "max_train_steps": 800_000, "beta_start": 1e-4, "beta_end": 0.02}
PAST |= {"compile": False, "mixed_precision": "no"}


def choice(*words):
    return parse_config(["--dataset", "mine", *words])


@pytest.mark.parametrize("name", preset_names())
def test_comments_of_presets_state_counted_parameters_and_memory(name):
    text, config = preset_path(name).read_text(), preset_config(name)
    with torch.device("meta"):
        count = UNet2DModel(**config.unet()).num_parameters()
    size = MemoryPlan(config, Accelerator(cpu=True)).count().total
    places = 0 if count > 1e8 else 1
    assert float(re.search(r"([\d.]+)M parameters", text)[1]) == round(count / 1e6, places)
    assert float(re.search(r"Memory: ([\d.]+) GiB", text)[1]) == round(size / 2**30, places)
    assert size < 80e9  # the memory of one GPU
    if name in SMALL:
        assert 2e6 <= count <= 10e6 and size < 6 * 2**30
        assert (config.training.train_batch_size, config.diffusion.variance_type) == (32, "fixed_small")
        assert config.training.ema_warmup and not config.data.horizontal_flip and config.data.channels == 3


@pytest.mark.parametrize(
    ("resolution", "name"), [([], "small-32"), (["28"], "small-32"), (["48"], "small-64"), (["64", "96"], "small-64")]
)
def test_automatic_preset_depends_on_resolution(resolution, name):
    words = ["--resolution", *resolution] if resolution else []
    config, other = choice(*words), "" if resolution else "--resolution 64 (small-64), "
    assert config == choice("--preset", name, *words)
    assert config.notes == [
        f"--preset {name} (default at this resolution). Others: {other}--preset cifar10 (the paper's)"
    ]
    assert choice("--preset", name, *words).notes == []


def test_init_from_is_reported_with_automatic_preset():
    assert choice("--init_from", "a/b").notes == [
        "--preset small-32 (default at this resolution), with the network of --init_from"
    ]


def test_null_values_of_file_count_as_not_given(tmp_path):
    names = ("resolution", "block_out_channels", "train_batch_size", "max_train_steps")
    (tmp_path / "a.yaml").write_text("dataset: mine\n" + "".join(f"{name}: null\n" for name in names))
    assert parse_config(["--config", str(tmp_path / "a.yaml")]) == choice()


def test_digits_use_their_preset():
    assert parse_config(["--dataset", "digits"]) == parse_config(["--preset", "digits"])


def test_given_options_override_automatic_preset(tmp_path):
    config = choice("--resolution", "64", "--attention_resolutions", "32", "--dropout", "0", "--max_train_steps", "7")
    assert config.model.attention_resolutions == [32] and config.model.dropout == 0
    assert (config.training.max_train_steps, config.training.train_batch_size) == (7, 32)
    assert choice("--num_train_epochs", "3").training.max_train_steps is None
    (tmp_path / "some.yaml").write_text("dataset: mine\nresolution: 64\nlearning_rate: 0.5\n")
    config = parse_config(["--config", str(tmp_path / "some.yaml")])
    assert config.model == choice("--resolution", "64").model and config.training.learning_rate == 0.5
    config.save(tmp_path / "config.yaml")
    stored = parse_config(["--config", str(tmp_path / "config.yaml")])
    assert stored.model == config.model and stored.notes == []  # the file sets the network, so no preset is chosen


def test_given_network_uses_defaults_of_paper():
    config = choice("--block_out_channels", "32", "64")
    assert config.notes == [] and config.training == TrainingConfig()
    assert config.model == ModelConfig(block_out_channels=[32, 64])


@pytest.mark.parametrize(
    ("preset", "side", "attended"),
    [("small-32", 28, 7), ("small-32", 24, 6), ("small-32", 16, 8), ("small-64", 72, 9), ("digits", 32, 16)],
)
def test_attention_moves_to_resolution_that_network_reaches(preset, side, attended):
    # The preset's 8, 16 (small-64) or 4 (digits) if the network reaches it, or else the next lower one, or the lowest.
    config = choice("--preset", preset, "--resolution", str(side))
    assert config.model.attention_resolutions == [attended] and attended in config.resolutions


@pytest.mark.parametrize("side", [16, 24, 28, 36, 40, *range(48, 264, 8)])
def test_each_resolution_has_small_network(side):
    config = choice("--resolution", str(side))
    with torch.device("meta"):
        assert UNet2DModel(**config.unet()).num_parameters() < 10e6


@pytest.mark.parametrize(("images", "steps"), [(300, 10_000), (10_000, 31_250), (60_000, 100_000)])
def test_auto_max_train_steps_is_100_epochs_within_bounds(images, steps):
    # 100 epochs of 10,000 images at batch size 32 are 31,250 steps; two processes need half as many.
    training = choice().training
    assert isinstance(training.max_train_steps, Auto) and training.counted(images, 1).max_train_steps == steps
    assert training.counted(20_000, 2).max_train_steps == 31_250
    assert choice("--num_train_epochs", "32").training.counted(images, 1).max_train_steps == images


@pytest.mark.parametrize("name", sorted({*preset_names()} - {*SMALL}))
def test_data_options_of_preset_are_not_used_for_other_datasets(name):
    own = yaml.safe_load(preset_path(name).read_text())
    config = choice("--preset", name)
    assert (config.data.channels, config.data.levels, config.data.streaming) == (3, 256, False)
    assert config.data.horizontal_flip is False and config.data.class_column is None
    assert (config.evaluation, config.hub) == (EvaluationConfig(), HubConfig())
    # Network, resolution, process and training options come from the preset.
    assert config.data.resolution == own["resolution"] and config.model.dropout == own["dropout"]
    assert config.model.block_out_channels == own["block_out_channels"]
    assert config.training.learning_rate == float(own["learning_rate"])
    lost = {"streaming", "horizontal_flip", "levels", "license", "eval_metrics"} & {
        key for key, value in own.items() if value is not False
    }
    (line,) = config.notes or [""]
    assert {key for key in lost if f"--{key} " in line} == lost and "--split" not in line
    assert line.startswith(f"--preset {name}: options not used with --dataset mine: ") is bool(lost)


def test_given_data_options_are_kept(tmp_path):
    assert parse_config(["--preset", "digits", "--dataset", "digits"]) == parse_config(["--preset", "digits"])
    (tmp_path / "mine.yaml").write_text("dataset: mine\nchannels: 1\n")
    config = parse_config(["--preset", "digits", "--config", str(tmp_path / "mine.yaml"), "--license", "mit"])
    assert (config.data.channels, config.data.levels, config.hub.license) == (1, 256, "mit")


@pytest.mark.parametrize("words", [[], ["--resolution", "64"], ["--attention_resolutions", "8"], ["--dropout", "0"]])
def test_old_runs_without_preset_resume_with_defaults_of_paper(words):
    now = choice(*words)
    given = {name: now.to_dict()[name] for name in (word[2:] for word in words if word.startswith("--"))}
    past = PAST | given
    assert now.resumed(past).to_dict() == past


def test_old_runs_of_preset_with_other_images_resume_with_their_options():
    past = parse_config(["--preset", "digits"]).to_dict() | {"dataset": "mine"}
    assert choice("--preset", "digits").resumed(past).to_dict() == past


def test_runs_of_automatic_preset_resume_to_length_of_preset():
    past = choice().to_dict() | {"max_train_steps": 438}  # the run was ended here
    assert isinstance(choice().resumed(past).training.max_train_steps, Auto)
    assert choice("--max_train_steps", "20000").resumed(past).training.max_train_steps == 20_000
    assert choice("--num_train_epochs", "2").resumed(past).training.num_train_epochs == 2


def test_divided_batch_stays_divided_on_resuming():
    past = choice("--train_batch_size", "8", "--gradient_accumulation_steps", "4").to_dict() | {"max_train_steps": 52}
    training = choice("--num_samples", "3").resumed(past).training
    assert (training.train_batch_size, training.gradient_accumulation_steps) == (8, 4)
    assert isinstance(training.max_train_steps, Auto)  # without a given length, the preset's
