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
# What runs had without a preset before there were small ones.
PAST = default_options() | {"dataset": "mine", "max_train_steps": 800_000, "beta_start": 1e-4, "beta_end": 0.02}
PAST |= {"compile": False, "mixed_precision": "no"}


def choice(*words):
    return parse_config(["--dataset", "mine", *words])


@pytest.mark.parametrize("name", preset_names())
def test_parameters_and_memory_of_a_preset_are_those_that_are_counted(name):
    text, config = preset_path(name).read_text(), preset_config(name)
    with torch.device("meta"):
        count = UNet2DModel(**config.unet()).num_parameters()
    size = MemoryPlan(config, Accelerator(cpu=True)).count().total
    places = 0 if count > 1e8 else 1
    assert float(re.search(r"([\d.]+)M parameters", text)[1]) == round(count / 1e6, places)
    assert float(re.search(r"Memory: ([\d.]+) GiB", text)[1]) == round(size / 2**30, places)
    assert size < 80e9  # a GPU
    if name in SMALL:
        assert 2e6 <= count <= 10e6 and size < 6 * 2**30
        assert (config.training.train_batch_size, config.diffusion.variance_type) == (32, "fixed_small")
        assert config.training.ema_warmup and not config.data.horizontal_flip and config.data.channels == 3


@pytest.mark.parametrize(
    ("resolution", "name"), [([], "small-32"), (["28"], "small-32"), (["48"], "small-64"), (["64", "96"], "small-64")]
)
def test_images_without_a_preset_get_the_small_one_of_their_resolution(resolution, name):
    words = ["--resolution", *resolution] if resolution else []
    config, other = choice(*words), "" if resolution else "--resolution 64 (small-64), "
    assert config == choice("--preset", name, *words)
    assert config.notes == [
        f"--preset {name} (default at this resolution). Others: {other}--preset cifar10 (the paper's)"
    ]
    assert choice("--preset", name, *words).notes == []


def test_a_model_to_start_from_keeps_its_network_and_says_so():
    assert choice("--init_from", "a/b").notes == [
        "--preset small-32 (default at this resolution), with the network of --init_from"
    ]


def test_nulls_of_a_file_are_as_if_they_were_not_given(tmp_path):
    names = ("resolution", "block_out_channels", "train_batch_size", "max_train_steps")
    (tmp_path / "a.yaml").write_text("dataset: mine\n" + "".join(f"{name}: null\n" for name in names))
    assert parse_config(["--config", str(tmp_path / "a.yaml")]) == choice()


def test_the_digits_have_their_preset():
    assert parse_config(["--dataset", "digits"]) == parse_config(["--preset", "digits"])


def test_given_options_win_over_the_chosen_preset(tmp_path):
    config = choice("--resolution", "64", "--attention_resolutions", "32", "--dropout", "0", "--max_train_steps", "7")
    assert config.model.attention_resolutions == [32] and config.model.dropout == 0
    assert (config.training.max_train_steps, config.training.train_batch_size) == (7, 32)
    assert choice("--num_train_epochs", "3").training.max_train_steps is None
    (tmp_path / "some.yaml").write_text("dataset: mine\nresolution: 64\nlearning_rate: 0.5\n")
    config = parse_config(["--config", str(tmp_path / "some.yaml")])
    assert config.model == choice("--resolution", "64").model and config.training.learning_rate == 0.5
    config.save(tmp_path / "config.yaml")
    stored = parse_config(["--config", str(tmp_path / "config.yaml")])
    assert stored.model == config.model and stored.notes == []  # it has a network


def test_a_given_network_has_the_defaults_of_the_paper():
    config = choice("--block_out_channels", "32", "64")
    assert config.notes == [] and config.training == TrainingConfig()
    assert config.model == ModelConfig(block_out_channels=[32, 64])


@pytest.mark.parametrize(
    ("preset", "side", "attended"),
    [("small-32", 28, 7), ("small-32", 24, 6), ("small-32", 16, 8), ("small-64", 72, 9), ("digits", 32, 16)],
)
def test_attention_is_at_a_resolution_that_the_network_reaches(preset, side, attended):
    # The preset's 8, 16 (small-64) or 4 (digits) if the network reaches it, or else the next lower one, or the lowest.
    config = choice("--preset", preset, "--resolution", str(side))
    assert config.model.attention_resolutions == [attended] and attended in config.resolutions


@pytest.mark.parametrize("side", [16, 24, 28, 36, 40, *range(48, 264, 8)])
def test_every_resolution_has_a_network(side):
    config = choice("--resolution", str(side))
    with torch.device("meta"):
        assert UNet2DModel(**config.unet()).num_parameters() < 10e6


@pytest.mark.parametrize(("images", "steps"), [(300, 10_000), (10_000, 31_250), (60_000, 100_000)])
def test_a_length_of_auto_is_100_passes_within_bounds(images, steps):
    # 100 passes over 10,000 images in batches of 32: 31,250 steps; of two processes, half of them.
    training = choice().training
    assert isinstance(training.max_train_steps, Auto) and training.counted(images, 1).max_train_steps == steps
    assert training.counted(20_000, 2).max_train_steps == 31_250
    assert choice("--num_train_epochs", "32").training.counted(images, 1).max_train_steps == images


@pytest.mark.parametrize("name", sorted({*preset_names()} - {*SMALL}))
def test_the_data_options_of_a_preset_do_not_reach_other_images(name):
    own = yaml.safe_load(preset_path(name).read_text())
    config = choice("--preset", name)
    assert (config.data.channels, config.data.levels, config.data.streaming) == (3, 256, False)
    assert config.data.horizontal_flip is False and config.data.class_column is None
    assert (config.evaluation, config.hub) == (EvaluationConfig(), HubConfig())
    # Network, resolution, process and training are the preset's.
    assert config.data.resolution == own["resolution"] and config.model.dropout == own["dropout"]
    assert config.model.block_out_channels == own["block_out_channels"]
    assert config.training.learning_rate == float(own["learning_rate"])
    lost = {"streaming", "horizontal_flip", "levels", "license", "eval_metrics"} & {
        key for key, value in own.items() if value is not False
    }
    (line,) = config.notes or [""]
    assert {key for key in lost if f"--{key} " in line} == lost and "--split" not in line
    assert line.startswith(f"--preset {name}: not for --dataset mine: ") is bool(lost)


def test_given_data_options_stay_and_so_does_all_for_the_own_data_set(tmp_path):
    assert parse_config(["--preset", "digits", "--dataset", "digits"]) == parse_config(["--preset", "digits"])
    (tmp_path / "mine.yaml").write_text("dataset: mine\nchannels: 1\n")
    config = parse_config(["--preset", "digits", "--config", str(tmp_path / "mine.yaml"), "--license", "mit"])
    assert (config.data.channels, config.data.levels, config.hub.license) == (1, 256, "mit")


@pytest.mark.parametrize("words", [[], ["--resolution", "64"], ["--attention_resolutions", "8"], ["--dropout", "0"]])
def test_an_old_run_without_a_preset_resumes_with_the_defaults_of_the_paper(words):
    now = choice(*words)
    given = {name: now.to_dict()[name] for name in (word[2:] for word in words if word.startswith("--"))}
    past = PAST | given
    assert now.resumed(past).to_dict() == past


def test_an_old_run_of_a_preset_with_other_images_resumes_as_it_began():
    past = parse_config(["--preset", "digits"]).to_dict() | {"dataset": "mine"}
    assert choice("--preset", "digits").resumed(past).to_dict() == past


def test_a_run_of_a_chosen_preset_resumes_to_its_length_after_another_one():
    past = choice().to_dict() | {"max_train_steps": 438}  # where it was ended
    assert isinstance(choice().resumed(past).training.max_train_steps, Auto)
    assert choice("--max_train_steps", "20000").resumed(past).training.max_train_steps == 20_000
    assert choice("--num_train_epochs", "2").resumed(past).training.num_train_epochs == 2


def test_a_batch_that_was_divided_stays_divided():
    past = choice("--train_batch_size", "8", "--gradient_accumulation_steps", "4").to_dict() | {"max_train_steps": 52}
    training = choice("--num_samples", "3").resumed(past).training
    assert (training.train_batch_size, training.gradient_accumulation_steps) == (8, 4)
    assert isinstance(training.max_train_steps, Auto)  # a length that nobody gave is that of the preset
