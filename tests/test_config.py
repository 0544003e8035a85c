import dataclasses

import pytest
import torch
import yaml

from hf_ddpm import DDPMScheduler, UNet2DModel
from hf_ddpm.cli.presets import preset_config
from hf_ddpm.config import PARTS, DataConfig, DiffusionConfig, ModelConfig, parse_config
from hf_ddpm.presets import preset_names, preset_path
from hf_ddpm.utils.options import Auto

PAPERS = sorted({*preset_names()} - {"digits", "small-32", "small-64"})


def test_command_line_overrides_file_and_file_overrides_preset(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("learning_rate: 1e-4\nseed: 3\nhorizontal_flip: true\nblock_out_channels: [32, 64]\n")
    config = parse_config(["--preset", "digits", "--config", str(file), "--seed", "7"])
    assert config.training.seed == 7
    assert config.training.learning_rate == 1e-4  # YAML would read it as a string
    assert config.data.horizontal_flip is True
    assert config.model.block_out_channels == [32, 64]
    assert config.data.dataset == "digits"


def test_yaml_values_are_parsed_like_command_line_values(tmp_path):
    # `no` is the precision, not False; null resets the preset's value to the default.
    file = tmp_path / "x.yaml"
    file.write_text("mixed_precision: no\nhorizontal_flip: no\nattention_resolutions: [8, 4]\nnum_samples: null\n")
    config = parse_config(["--preset", "cifar10", "--dataset", "digits", "--resolution", "8", "--config", str(file)])
    assert config.training.mixed_precision == "no" and config.data.horizontal_flip is False
    assert config.model.attention_resolutions == [8, 4]
    assert config.training.num_samples == 64


def test_later_length_of_run_replaces_earlier_length(tmp_path):
    def length(*words):
        training = parse_config(["--preset", "digits", *words]).training
        return training.max_train_steps, training.num_train_epochs

    assert length() == (1500, None)
    assert length("--num_train_epochs", "3") == (None, 3) == length("--num-train-epochs=3")
    file = tmp_path / "x.yaml"
    file.write_text("num_train_epochs: 5\n")
    assert length("--config", str(file)) == (None, 5)
    assert length("--config", str(file), "--max_train_steps", "7") == (7, None)
    file.write_text("num_train_epochs: 5\nmax_train_steps: null\n")
    assert length("--config", str(file)) == (None, 5)
    file.write_text("max_train_steps: null\n")
    assert length("--config", str(file)) == (800_000, None)
    for words in (["--num_train_epochs", "3", "--max_train_steps", "7"], ["--config", str(file)]):
        file.write_text("num_train_epochs: 3\nmax_train_steps: 7\n")
        with pytest.raises(ValueError, match="--num_train_epochs 3: not supported with --max_train_steps 7"):
            length(*words)


def test_resumed_runs_keep_defaults_they_started_with():
    stored = {name: value for name, value in parse_config(["--preset", "digits"]).to_dict().items()
              if name not in ("timestep_spacing", "ema_warmup", "beta_end")}  # fmt: skip
    words = ["--preset", "digits", "--no-ema-warmup", "--beta_end", "0.5"]
    config = parse_config(words).resumed(stored)
    assert config.diffusion.timestep_spacing == "leading"  # the default of the stored run
    assert config.training.ema_warmup is False and config.diffusion.beta_end == 0.5
    given = parse_config([*words, "--timestep_spacing", "trailing"]).resumed(stored)
    assert given.diffusion.timestep_spacing == "trailing"
    changed = parse_config(words)
    changed.diffusion.timestep_spacing = "linspace"
    assert changed.resumed(stored).diffusion.timestep_spacing == "linspace"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("seed: [1, 2]", r"x.yaml: seed: \['1', '2'\]; expected one value"),
        ("seed: {a: 1}", "x.yaml: seed: .*; expected one value"),
        ("block_out_channels: {a: 1}", "x.yaml: block_out_channels: .*; expected a list with at least one entry"),
        ("attention_resolutions: []", r"x.yaml: attention_resolutions: \[\]; expected a list with at least one entry"),
        ("preset: cifar10", "unknown option preset"),
        ("help: 1", "unknown option help"),
        ("lerning_rate: 1", "unknown option lerning_rate: did you mean learning_rate?"),
    ],
)
def test_invalid_yaml_options_are_rejected(tmp_path, line, message):
    (tmp_path / "x.yaml").write_text(line)
    with pytest.raises(ValueError, match=message):
        parse_config(["--preset", "digits", "--config", str(tmp_path / "x.yaml")])


@pytest.mark.parametrize("name", preset_names())
def test_presets_contain_only_valid_options(name):
    text = preset_path(name).read_text()
    assert text.startswith("# ")
    options, values = yaml.safe_load(text), preset_config(name).to_dict()
    if options["max_train_steps"] == "auto":
        assert isinstance(values["max_train_steps"], Auto)
        del options["max_train_steps"]
    assert options.items() <= values.items()


# Appendix B, and Table 3; the number of parameters in millions.
@pytest.mark.parametrize(
    ("name", "parameters", "steps"),
    [
        ("cifar10", 35.7, 800_000),
        ("celebahq-256", 114, 500_000),
        ("lsun-bedroom-256", 114, 2_400_000),
        ("lsun-bedroom-256-large", 256, 1_150_000),
        ("lsun-cat-256", 114, 1_800_000),
        ("lsun-church-256", 114, 1_200_000),
    ],
)
def test_presets_of_paper_have_its_parameters_and_steps(name, parameters, steps):
    config = parse_config(["--preset", name])
    with torch.device("meta"):
        unet = UNet2DModel(**config.unet())
    digits = 1 if parameters < 100 else 0
    assert round(unet.num_parameters() / 1e6, digits) == parameters
    assert config.training.max_train_steps == steps
    images = config.training.max_train_steps * config.training.global_batch_size(1)
    text = " ".join(preset_path(name).read_text().replace("\n#", "").split())
    assert f"Images seen: {images / 1e6:g}M (" in text and f"{parameters:g}M parameters" in text
    if name != "cifar10":
        assert (config.training.global_batch_size(1), config.training.learning_rate) == (64, 2e-5)
        assert config.model.dropout == 0 and config.data.size == (256, 256)
        assert config.data.horizontal_flip is not name.startswith("lsun-bedroom")


# Configurations of google/ddpm-cifar10-32, -celebahq-256, -church-256, ... on the Hub, which have the authors' weights.
PUBLISHED_UNET = {
    "in_channels": 3, "out_channels": 3, "center_input_sample": False, "time_embedding_type": "positional",
    "freq_shift": 1, "flip_sin_to_cos": False, "layers_per_block": 2, "mid_block_scale_factor": 1,
    "downsample_padding": 0, "act_fn": "silu", "attention_head_dim": None, "norm_num_groups": 32, "norm_eps": 1e-6,
}  # fmt: skip
# Options that diffusers added later, with their defaults.
LATER_UNET = {
    "time_embedding_dim": None, "mid_block_type": "UNetMidBlock2D", "downsample_type": "conv", "upsample_type": "conv",
    "attn_norm_num_groups": None, "resnet_time_scale_shift": "default", "add_attention": True,
    "class_embed_type": None, "num_class_embeds": None, "num_train_timesteps": None,
}  # fmt: skip


@pytest.mark.parametrize("name", PAPERS)
def test_presets_of_paper_equal_published_models(name):
    # All options that affect the output are compared: another epsilon or padding would have weights of the same shapes.
    config = parse_config(["--preset", name])
    multiples = (1, 2, 2, 2) if name == "cifar10" else (1, 1, 2, 2, 4, 4)
    attends = [size == 16 for size in (32, 16, 8, 4)] if name == "cifar10" else [i == 4 for i in range(6)]
    width = 192 if name.endswith("large") else 128
    with torch.device("meta"):
        unet = UNet2DModel(**config.unet()).config
    assert {
        key: list(value) if isinstance(value, tuple) else value for key, value in unet.items() if key[0] != "_"
    } == {
        **PUBLISHED_UNET,
        **LATER_UNET,
        "sample_size": 32 if name == "cifar10" else 256,
        "block_out_channels": [width * multiple for multiple in multiples],
        "down_block_types": ["AttnDownBlock2D" if attended else "DownBlock2D" for attended in attends],
        "up_block_types": ["AttnUpBlock2D" if attended else "UpBlock2D" for attended in reversed(attends)],
        "dropout": 0.1 if name == "cifar10" else 0.0,
    }
    scheduler = DDPMScheduler(**config.scheduler())
    torch.testing.assert_close(scheduler.betas.double(), torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
    process = {key: scheduler.config[key] for key in ("prediction_type", "variance_type", "clip_sample")}
    variance = "fixed_large" if name == "cifar10" else "fixed_small"
    assert process == {"prediction_type": "epsilon", "variance_type": variance, "clip_sample": True}
    training = config.training
    assert (training.objective, training.ema_decay, training.adam_beta2) == ("simple", [0.9999], 0.999)
    assert (training.lr_schedule, training.max_grad_norm, config.data.levels) == ("constant", 1.0, 256)


def test_defaults_are_options_of_paper():
    # Section 4 and Appendix B, for CIFAR-10.
    paper = parse_config(["--preset", "cifar10"])
    assert (paper.model, paper.diffusion) == (ModelConfig(), DiffusionConfig())
    training = paper.training
    assert (training.learning_rate, training.train_batch_size, training.warmup_steps) == (2e-4, 128, 5000)
    assert (training.max_grad_norm, training.ema_decay, training.max_train_steps) == (1.0, [0.9999], 800_000)
    assert paper.model.dropout == 0.1 and paper.data.horizontal_flip is True
    assert paper.diffusion.variance_type == "fixed_large"


def test_public_option_names_exist():
    options = {field.name for part in PARTS for field in dataclasses.fields(part)}
    assert options >= {
        "dataset", "image_column", "resolution", "train_batch_size", "max_train_steps", "checkpointing_steps", "resume",
        "seed", "mixed_precision", "gradient_accumulation_steps", "prediction_type", "variance_type", "beta_schedule",
        "output_dir",
    }  # fmt: skip


@pytest.mark.parametrize("more", [[], ["--value_range", "-1", "2.5", "--channels", "6", "--levels", "65536"]])
def test_saved_options_load_as_same_config(tmp_path, more):
    config = parse_config(["--preset", "digits", "--seed", "5", "--attention_head_dim", "8", *more])
    config.save(tmp_path / "config.yaml")
    assert parse_config(["--config", str(tmp_path / "config.yaml")]) == config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lerning_rate 1", "unknown option --lerning_rate: did you mean --learning_rate?"),
        ("--nonsense 1", "unknown option --nonsense: see --help"),
        ("--lr 1e-4", r"unknown option --lr: did you mean --learning_rate\?"),
        (
            "--schedule linear --lr 1",
            r"unknown options --schedule: did you mean --lr_schedule\?; --lr: did you mean --learning_rate\?",
        ),
        ("--preset cats", "--preset cats: expected one of celebahq-256, cifar10, digits, lsun-bedroom"),
        ("--config none.yaml", "--config none.yaml: cannot be read"),
        ("--max_train_steps many", "^--max_train_steps many: expected an integer or auto$"),
        ("--max_train_steps 0", "--max_train_steps 0: expected at least 1"),
        ("--learning_rate -1", "--learning_rate -1.0: expected a value above 0"),
        ("--num_train_epochs 0", "--num_train_epochs 0: expected at least 1"),
        ("--weight_decay -1", "--weight_decay -1.0: expected at least 0"),
        ("--adam_beta1 1", r"--adam_beta1 1.0: expected a value in \[0, 1\)"),
        ("--lr_power 0", "--lr_power 0.0: expected a value above 0"),
        ("--dropout 1", r"--dropout 1.0: expected a value in \[0, 1\)"),
        ("--ema_decay 1", r"--ema_decay 1.0: expected a value in \[0, 1\)"),
        ("--beta_schedule cosine", "^--beta_schedule cosine: expected one of linear, scaled_linear, "),
        ("--variance_type learnt", "^--variance_type learnt: expected one of fixed_small, fixed_large, "),
        ("--channels 0", "--channels 0: expected at least 1"),
        ("--levels 70000", "--levels 70000: expected 2 to 65536"),
        ("--value_range 1", r"--value_range 1.0: expected two finite numbers LOW HIGH"),
        ("--value_range 1 -1", r"--value_range 1.0 -1.0: expected two finite numbers LOW HIGH"),
        ("--background x", "--background x: expected an opaque color such as white, #336699 or rgb"),
        ("--background #00ff0080", "--background #00ff0080: expected an opaque color such as"),
        ("--background rgb(256,0,0)", r"--background rgb\(256,0,0\): expected an opaque color such as"),
        (
            "--resolution 9",
            "^--resolution 9: the U-Net with 2 resolutions needs multiples of 2; expected for example 8$",
        ),
        ("--attention_resolutions 3", r"--attention_resolutions 3: expected any of \[8, 4\], or 0 for none"),
        ("--attention_head_dim 999", "--attention_head_dim 999: expected at most 64, the channels of the narrowest"),
        ("--num_train_timesteps 1", "--num_train_timesteps 1: expected at least 2"),
        ("--block_out_channels 2 2 --norm_num_groups 1", "at least 4 at the highest resolution"),
        ("--norm_num_groups 0", "--norm_num_groups 0: expected at least 1"),
        ("--learning_rate inf", "^--learning_rate inf: expected a finite number$"),
        ("--mixed_precision a/--b", "^--mixed_precision a/--b: expected one of auto, no, bf16, fp16$"),
        ("--train_batch_size 1000000000", "--train_batch_size 1000000000: needs 238 GiB of memory; expected at most"),
        ("--resolution 10000000", "--resolution .*: needs 372,529 GiB of memory; expected at most"),
        ("--norm_num_groups 5", "--block_out_channels 32 64: expected multiples of --norm_num_groups 5"),
    ],
)
def test_errors_for_invalid_options_are_one_line(words, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_config(["--preset", "digits", *words.split()])
    assert "\n" not in str(caught.value)


def test_dataset_is_required():
    with pytest.raises(ValueError, match="--dataset '': expected a dataset, such as"):
        parse_config([])
    with pytest.raises(ValueError, match="--dataset ''"):
        DataConfig()


def test_files_without_options_are_rejected(tmp_path):
    for content, message in [
        ("- a\n- b\n", "contains no options"),
        ("a: [", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        ("size: 3", "unknown option size: see --help"),
    ]:
        (tmp_path / "x.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ValueError, match=message) as caught:
            parse_config(["--config", str(tmp_path / "x.yaml"), "--dataset", "digits"])
        assert "\n" not in str(caught.value)


def test_blocks_have_attention_at_attention_resolutions():
    unet = parse_config(["--preset", "cifar10"]).unet()
    assert unet["down_block_types"] == ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")
    assert unet["up_block_types"] == ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D")


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "quad", "const", "squaredcos_cap_v2", "sigmoid"])
@pytest.mark.parametrize("total", [10, 50, 200, 4000])
def test_process_ends_in_noise_for_any_number_of_steps(total, schedule):
    # The paper's 1e-4 to 0.02 are for T = 1000: with T = 50, 60% of the variance of x_T would be signal.
    words = ["--dataset", "digits", "--num_train_timesteps", str(total), "--beta_schedule", schedule]
    scheduler = DDPMScheduler(**parse_config(words).scheduler())
    assert scheduler.alphas_cumprod[-1] < 1e-3
    if total == 4000:
        assert parse_config(words).diffusion.beta_end == pytest.approx(0.005)


def test_presets_have_betas_of_paper():
    for name in preset_names():
        process = preset_config(name).scheduler()
        assert (process["num_train_timesteps"], process["beta_start"], process["beta_end"]) == (1000, 1e-4, 0.02)
