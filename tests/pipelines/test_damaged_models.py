"""Damaged model folders: one line that names file, key and value."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_ddpm import DDPMPipeline, DDPMScheduler, UNet2DModel
from hf_ddpm.pipelines.pipeline_ddpm import load_pipeline
from hf_ddpm.provenance import model_checksum
from hf_ddpm.utils.schema import check_types, conforms, describe

from ..conftest import TINY_UNET

CONFIGS = {"index": "model_index.json", "unet": "unet/config.json", "scheduler": "scheduler/scheduler_config.json"}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    pipe = DDPMPipeline(UNet2DModel(**TINY_UNET, num_class_embeds=3), DDPMScheduler(), {"0": "a", "1": "b"})
    pipe.save_pretrained(tmp_path)
    return tmp_path


def refusal(folder):
    with pytest.raises(ValueError) as caught:
        load_pipeline(str(folder), "cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"model {str(folder)!r} cannot be loaded: ")


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("index", "unet", []),
        ("index", "unet", [None, None]),
        ("index", "scheduler", "DDPMScheduler"),
        ("index", "id2label", {"0": "a", "2": "b"}),
        ("index", "id2label", ["a", "b"]),
        ("index", "id2label", {"0": None}),
        ("index", "num_inference_steps", 0),
        ("index", "num_inference_steps", "4"),
        ("index", "num_inference_steps", True),
        ("unet", "norm_num_groups", 0),
        ("unet", "norm_num_groups", -4),
        ("unet", "sample_size", "8"),
        ("unet", "sample_size", [8, 8, 8]),
        ("unet", "sample_size", 0),
        ("unet", "in_channels", 1.5),
        ("unet", "in_channels", True),
        ("unet", "block_out_channels", None),
        ("unet", "block_out_channels", []),
        ("unet", "block_out_channels", 8),
        ("unet", "down_block_types", "DownBlock2D"),
        ("unet", "dropout", 2),
        ("unet", "norm_eps", float("nan")),
        ("unet", "norm_eps", 0),
        ("unet", "act_fn", {}),
        ("unet", "layers_per_block", 10**9),
        ("unet", "freq_shift", 4),
        ("unet", "attn_norm_num_groups", 7),
        ("unet", "mid_block_scale_factor", 0),
        ("scheduler", "num_train_timesteps", "1000"),
        ("scheduler", "num_train_timesteps", 10**12),
        ("scheduler", "num_train_timesteps", 0),
        ("scheduler", "beta_end", 2),
        ("scheduler", "beta_start", None),
        ("scheduler", "beta_schedule", 3),
        ("scheduler", "trained_betas", [0.1, "x"]),
        ("scheduler", "trained_betas", [0.1, -0.1]),
        ("scheduler", "clip_sample", "yes"),
        ("scheduler", "variance_type", "fixed"),
        ("scheduler", "timestep_spacing", ["trailing"]),
        ("scheduler", "steps_offset", -1),
        ("scheduler", "clip_sample_range", float("inf")),
    ],
)
def test_a_damaged_value_is_one_line_with_its_file_and_key(saved, file, key, value):
    path = saved / CONFIGS[file]
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, key: value}))
    line = refusal(saved)
    assert line.startswith(f"{CONFIGS[file]}: ") and key in line
    path.write_text(json.dumps(config))
    load_pipeline(str(saved), "cpu")


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "{", "3", '"x"', "\x00", "[" * 100_000])
@pytest.mark.parametrize("file", CONFIGS)
def test_a_configuration_that_is_none_is_one_line(saved, file, text):
    (saved / CONFIGS[file]).write_text(text)
    if text == "{}" and file == "scheduler":
        load_pipeline(str(saved), "cpu")  # all of its defaults
    else:
        assert refusal(saved)


def test_weights_must_fit_the_network(saved):
    weights = load_file(saved / WEIGHTS)
    few = {name: value for name, value in weights.items() if name != "conv_in.bias"}
    for tensors, line in (
        (few, "it lacks 1 weights, conv_in.bias among them"),
        ({**weights, "conv_on.bias": torch.zeros(8)}, "holds 1 weights that its network has no place for"),
        ({**weights, "conv_in.bias": torch.full((8,), float("nan"))}, "1 weights that are not finite, conv_in.bias"),
        ({**weights, "conv_in.bias": torch.tensor([0.0] * 7 + [float("inf")])}, "weights that are not finite"),
        ({**weights, "conv_in.bias": torch.zeros(9)}, "conv_in.bias"),
    ):
        save_file(tensors, saved / WEIGHTS)
        assert line in refusal(saved)
    save_file(weights, saved / WEIGHTS)
    # Without its classes the network would be another one.
    config = json.loads((saved / CONFIGS["unet"]).read_text())
    (saved / CONFIGS["unet"]).write_text(json.dumps({**config, "num_class_embeds": None}))
    assert "class_embedding.weight" in refusal(saved)


def test_names_of_classes_fit_the_network(saved):
    path = saved / CONFIGS["index"]
    path.write_text(json.dumps({**json.loads(path.read_text()), "id2label": {"0": "a"}}))
    assert "id2label names 1 classes, unet/config.json: num_class_embeds=3" in refusal(saved)


@pytest.mark.parametrize("kept", [0, 1, 8, 100, 0.5, -1])
def test_truncated_weights_are_one_line(saved, kept):
    content = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(content[: int(len(content) * kept) if isinstance(kept, float) else kept])
    assert refusal(saved)


def test_an_export_that_was_changed_is_said(saved, caplog):
    pipe = load_pipeline(str(saved), "cpu")
    (saved / "export.json").write_text(json.dumps({"step": 4, "checksum": model_checksum(pipe)}))
    with caplog.at_level(logging.WARNING):
        load_pipeline(str(saved), "cpu")
        assert not caplog.records
        weights = load_file(saved / WEIGHTS)
        weights["conv_in.bias"][0] += 1e-3  # as a flipped bit would
        save_file(weights, saved / WEIGHTS)
        load_pipeline(str(saved), "cpu")
    assert "differ from those that the run exported" in caplog.text


def test_types_are_those_of_the_annotations():
    for value, hint, fits in (
        (1, int, True),
        (True, int, False),
        (1, float, True),
        (float("inf"), float, False),
        ("1", float, False),
        ([1, 2], tuple[int, int], True),
        ([1, 2, 3], tuple[int, int], False),
        ([1, "2"], tuple[int, ...], False),
        (None, int | None, True),
        ({"a": 1}, dict[str, int], True),
        ({"a": "1"}, dict[str, int], False),
    ):
        assert conforms(value, hint) is fits, (value, hint)
    with pytest.raises(ValueError, match=r"size='8': expected int or a list of 2 int or null"):
        check_types({"size": "8"}, {"size": int | tuple[int, int] | None})
    assert describe(list[float]) == "a list of a finite number"
