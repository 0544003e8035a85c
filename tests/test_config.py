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


def test_the_command_line_wins_over_the_file_and_the_file_over_the_preset(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("learning_rate: 1e-4\nseed: 3\nhorizontal_flip: true\nblock_out_channels: [32, 64]\n")
    config = parse_config(["--preset", "digits", "--config", str(file), "--seed", "7"])
    assert config.training.seed == 7
    assert config.training.learning_rate == 1e-4  # which YAML alone reads as a string
    assert config.data.horizontal_flip is True
    assert config.model.block_out_channels == [32, 64]
    assert config.data.dataset == "digits"


def test_yaml_values_are_read_as_they_are_written(tmp_path):
    # YAML itself takes no for False and null for nothing; here null undoes the preset's value.
    file = tmp_path / "x.yaml"
    file.write_text("mixed_precision: no\nhorizontal_flip: no\nattention_resolutions: [8, 4]\nnum_samples: null\n")
    config = parse_config(["--preset", "cifar10", "--dataset", "digits", "--resolution", "8", "--config", str(file)])
    assert config.training.mixed_precision == "no" and config.data.horizontal_flip is False
    assert config.model.attention_resolutions == [8, 4]
    assert config.training.num_samples == 64


def test_the_length_of_a_run_is_given_once_and_a_later_one_replaces_an_earlier_one(tmp_path):
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
        with pytest.raises(ValueError, match="num_train_epochs=3 is not allowed: max_train_steps=7 is given, too"):
            length(*words)


def test_what_nobody_has_chosen_keeps_the_default_of_the_runs_beginning():
    stored = {name: value for name, value in parse_config(["--preset", "digits"]).to_dict().items()
              if name not in ("timestep_spacing", "ema_warmup", "beta_end")}  # fmt: skip
    words = ["--preset", "digits", "--no-ema-warmup", "--beta_end", "0.5"]
    config = parse_config(words).resumed(stored)
    assert config.diffusion.timestep_spacing == "leading"  # of that time
    assert config.training.ema_warmup is False and config.diffusion.beta_end == 0.5
    given = parse_config([*words, "--timestep_spacing", "trailing"]).resumed(stored)
    assert given.diffusion.timestep_spacing == "trailing"
    changed = parse_config(words)
    changed.diffusion.timestep_spacing = "linspace"
    assert changed.resumed(stored).diffusion.timestep_spacing == "linspace"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("seed: [1, 2]", r"seed=\['1', '2'\] is not allowed: one value"),
        ("seed: {a: 1}", "seed=.* is not allowed: one value"),
        ("block_out_channels: {a: 1}", "block_out_channels=.* is not allowed: a list with an entry"),
        ("attention_resolutions: []", r"attention_resolutions=\[\] is not allowed: a list with an entry"),
        ("preset: cifar10", "unknown option preset"),
        ("help: 1", "unknown option help"),
        ("lerning_rate: 1", "unknown option lerning_rate: did you mean learning_rate?"),
    ],
)
def test_yaml_that_is_no_option_is_refused(tmp_path, line, message):
    (tmp_path / "x.yaml").write_text(line)
    with pytest.raises(ValueError, match=message):
        parse_config(["--preset", "digits", "--config", str(tmp_path / "x.yaml")])


@pytest.mark.parametrize("name", preset_names())
def test_presets_say_only_what_options_say_and_where_they_come_from(name):
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
def test_every_model_of_the_paper_has_its_size_and_its_steps(name, parameters, steps):
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


# The configurations of the Hub's google/ddpm-cifar10-32, -celebahq-256, -church-256, ...: the authors' weights.
PUBLISHED_UNET = {
    "in_channels": 3, "out_channels": 3, "center_input_sample": False, "time_embedding_type": "positional",
    "freq_shift": 1, "flip_sin_to_cos": False, "layers_per_block": 2, "mid_block_scale_factor": 1,
    "downsample_padding": 0, "act_fn": "silu", "attention_head_dim": None, "norm_num_groups": 32, "norm_eps": 1e-6,
}  # fmt: skip
# What diffusers added later, with its defaults.
LATER_UNET = {
    "time_embedding_dim": None, "mid_block_type": "UNetMidBlock2D", "downsample_type": "conv", "upsample_type": "conv",
    "attn_norm_num_groups": None, "resnet_time_scale_shift": "default", "add_attention": True,
    "class_embed_type": None, "num_class_embeds": None, "num_train_timesteps": None,
}  # fmt: skip


@pytest.mark.parametrize("name", PAPERS)
def test_every_model_of_the_paper_is_the_published_one(name):
    # All that decides what is computed is stated here: a network with another epsilon or padding has the same weights.
    config = parse_config(["--preset", name])
    multiples = (1, 2, 2, 2) if name == "cifar10" else (1, 1, 2, 2, 4, 4)
    attends = [size == 16 for size in (32, 16, 8, 4)] if name == "cifar10" else [i == 4 for i in range(6)]
    width = 192 if name.endswith("large") else 128
    with torch.device("meta"):
        found = UNet2DModel(**config.unet()).config
    assert {
        key: list(value) if isinstance(value, tuple) else value for key, value in found.items() if key[0] != "_"
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


def test_the_defaults_are_those_of_the_paper():
    # Section 4 and Appendix B, for CIFAR-10.
    paper = parse_config(["--preset", "cifar10"])
    assert (paper.model, paper.diffusion) == (ModelConfig(), DiffusionConfig())
    training = paper.training
    assert (training.learning_rate, training.train_batch_size, training.warmup_steps) == (2e-4, 128, 5000)
    assert (training.max_grad_norm, training.ema_decay, training.max_train_steps) == (1.0, [0.9999], 800_000)
    assert paper.model.dropout == 0.1 and paper.data.horizontal_flip is True
    assert paper.diffusion.variance_type == "fixed_large"


def test_the_options_are_a_contract():
    options = {field.name for part in PARTS for field in dataclasses.fields(part)}
    assert options >= {
        "dataset", "image_column", "resolution", "train_batch_size", "max_train_steps", "checkpointing_steps", "resume",
        "seed", "mixed_precision", "gradient_accumulation_steps", "prediction_type", "variance_type", "beta_schedule",
        "output_dir",
    }  # fmt: skip


@pytest.mark.parametrize("more", [[], ["--value_range", "-1", "2.5", "--channels", "6", "--levels", "65536"]])
def test_the_saved_options_make_the_same_run(tmp_path, more):
    config = parse_config(["--preset", "digits", "--seed", "5", "--attention_head_dim", "8", *more])
    config.save(tmp_path / "config.yaml")
    assert parse_config(["--config", str(tmp_path / "config.yaml")]) == config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lerning_rate 1", "unknown option --lerning_rate: did you mean --learning_rate?"),
        ("--nonsense 1", "unknown option --nonsense: see --help"),
        ("--preset cats", "preset='cats' is not allowed: one of celebahq-256, cifar10, digits, lsun-bedroom"),
        ("--config none.yaml", "config 'none.yaml' cannot be read"),
        ("--max_train_steps many", "argument --max_train_steps: invalid int or auto value: 'many'"),
        ("--max_train_steps 0", "max_train_steps=0 is not allowed: at least 1"),
        ("--learning_rate -1", "learning_rate=-1.0 is not allowed: more than 0"),
        ("--num_train_epochs 0", "num_train_epochs=0 is not allowed: at least 1"),
        ("--weight_decay -1", "weight_decay=-1.0 is not allowed: at least 0"),
        ("--adam_beta1 1", r"adam_beta1=1.0 is not allowed: in \[0, 1\)"),
        ("--lr_power 0", "lr_power=0.0 is not allowed: more than 0"),
        ("--dropout 1", r"dropout=1.0 is not allowed: in \[0, 1\)"),
        ("--ema_decay 1", r"ema_decay=\[1.0\] is not allowed: in \[0, 1\)"),
        ("--beta_schedule cosine", "argument --beta_schedule: invalid choice: 'cosine'"),
        ("--variance_type learnt", "argument --variance_type: invalid choice: 'learnt'"),
        ("--channels 0", "channels=0 is not allowed: at least 1"),
        ("--levels 70000", "levels=70000 is not allowed: 2 to 65536"),
        ("--value_range 1", r"value_range=\[1.0\] is not allowed: two finite numbers LOW HIGH"),
        ("--value_range 1 -1", r"value_range=\[1.0, -1.0\] is not allowed: two finite numbers LOW HIGH"),
        ("--background x", "background='x' is not allowed: an opaque color such as white, #336699 or rgb"),
        ("--background #00ff0080", "background='#00ff0080' is not allowed: an opaque color such as"),
        ("--background rgb(256,0,0)", r"background='rgb\(256,0,0\)' is not allowed: an opaque color such as"),
        ("--resolution 9", r"resolution=\[9\] is not allowed: multiples of 2, for the U-Net's 1 halvings"),
        ("--attention_resolutions 3", r"attention_resolutions=\[3\] is not allowed: any of \[8, 4\], or 0 for none"),
        ("--attention_head_dim 999", "attention_head_dim=999 is not allowed: at most the 64 channels there"),
        ("--num_train_timesteps 1", "num_train_timesteps=1 is not allowed: at least 2"),
        ("--block_out_channels 2 2 --norm_num_groups 1", "at least 4 at the highest resolution"),
        ("--norm_num_groups 0", "norm_num_groups=0 is not allowed: at least 1"),
        ("--learning_rate inf", "argument --learning_rate: 'inf' is not a finite number"),
        ("--mixed_precision a/--b", "invalid choice: 'a/--b'"),
        ("--train_batch_size 1000000000", r"train_batch_size=1000000000 is not allowed: it needs 238 GiB of memory"),
        ("--resolution 10000000", "resolution=.* is not allowed: it needs 372,529 GiB of memory"),
        ("--norm_num_groups 5", "is not allowed: multiples of norm_num_groups=5"),
    ],
)
def test_wrong_options_are_one_line_that_says_what_is_allowed(words, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_config(["--preset", "digits", *words.split()])
    assert "\n" not in str(caught.value)


def test_a_data_set_must_be_named():
    with pytest.raises(ValueError, match="dataset='' is not allowed: a data set, such as"):
        parse_config([])
    with pytest.raises(ValueError, match="dataset=''"):
        DataConfig()


def test_files_that_hold_no_options_are_refused(tmp_path):
    for content, message in [
        ("- a\n- b\n", "holds no options"),
        ("a: [", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        ("size: 3", "unknown option size: see --help"),
    ]:
        (tmp_path / "x.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ValueError, match=message) as caught:
            parse_config(["--config", str(tmp_path / "x.yaml"), "--dataset", "digits"])
        assert "\n" not in str(caught.value)


def test_attention_stands_at_its_resolutions():
    unet = parse_config(["--preset", "cifar10"]).unet()
    assert unet["down_block_types"] == ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")
    assert unet["up_block_types"] == ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D")


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "quad", "const", "squaredcos_cap_v2", "sigmoid"])
@pytest.mark.parametrize("total", [10, 50, 200, 4000])
def test_a_process_ends_in_noise_whatever_its_number_of_steps(total, schedule):
    # 1e-4 to 0.02 are for T = 1000: of 50 such steps, 60% of the variance of x_T is signal.
    words = ["--dataset", "digits", "--num_train_timesteps", str(total), "--beta_schedule", schedule]
    scheduler = DDPMScheduler(**parse_config(words).scheduler())
    assert scheduler.alphas_cumprod[-1] < 1e-3
    if total == 4000:
        assert parse_config(words).diffusion.beta_end == pytest.approx(0.005)


def test_the_betas_of_1000_steps_are_those_of_the_paper():
    for name in preset_names():
        process = preset_config(name).scheduler()
        assert (process["num_train_timesteps"], process["beta_start"], process["beta_end"]) == (1000, 1e-4, 0.02)
