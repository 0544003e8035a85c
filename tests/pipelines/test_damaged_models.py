"""Damaged model folders: errors of one line with file, key and value."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_ddpm import DDPMPipeline, DDPMScheduler, UNet2DModel
from hf_ddpm.pipelines.loading import load_pipeline
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


def loading_error(folder):
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
def test_invalid_values_are_reported_with_file_and_key(saved, file, key, value):
    path = saved / CONFIGS[file]
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, key: value}))
    line = loading_error(saved)
    assert line.startswith(f"{CONFIGS[file]}: ") and key in line
    path.write_text(json.dumps(config))
    load_pipeline(str(saved), "cpu")


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "{", "3", '"x"', "\x00", "[" * 100_000])
@pytest.mark.parametrize("file", CONFIGS)
def test_files_without_configuration_are_reported_in_one_line(saved, file, text):
    (saved / CONFIGS[file]).write_text(text)
    if text == "{}" and file == "scheduler":
        load_pipeline(str(saved), "cpu")  # valid: all options have their defaults
    else:
        assert loading_error(saved)


def test_weights_must_match_network(saved):
    weights = load_file(saved / WEIGHTS)
    few = {name: value for name, value in weights.items() if name != "conv_in.bias"}
    for tensors, line in (
        (few, "1 weights are missing, such as conv_in.bias"),
        ({**weights, "conv_on.bias": torch.zeros(8)}, "1 weights do not belong to its network, such as conv_on.bias"),
        ({**weights, "conv_in.bias": torch.full((8,), float("nan"))}, "1 weights are not finite, such as conv_in.bias"),
        ({**weights, "conv_in.bias": torch.tensor([0.0] * 7 + [float("inf")])}, "weights are not finite"),
        ({**weights, "conv_in.bias": torch.zeros(9)}, "conv_in.bias"),
    ):
        save_file(tensors, saved / WEIGHTS)
        assert line in loading_error(saved)
    save_file(weights, saved / WEIGHTS)
    # Without class embeddings, the weights do not belong to the network.
    config = json.loads((saved / CONFIGS["unet"]).read_text())
    (saved / CONFIGS["unet"]).write_text(json.dumps({**config, "num_class_embeds": None}))
    assert "class_embedding.weight" in loading_error(saved)


def test_class_names_must_match_network(saved):
    path = saved / CONFIGS["index"]
    path.write_text(json.dumps({**json.loads(path.read_text()), "id2label": {"0": "a"}}))
    expected = "id2label in model_index.json has 1 classes, but unet/config.json has num_class_embeds=3"
    assert expected in loading_error(saved)


@pytest.mark.parametrize("kept", [0, 1, 8, 100, 0.5, -1])
def test_truncated_weights_are_reported_in_one_line(saved, kept):
    content = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(content[: int(len(content) * kept) if isinstance(kept, float) else kept])
    assert loading_error(saved)


def test_changed_exports_are_reported(saved, caplog):
    pipe = load_pipeline(str(saved), "cpu")
    (saved / "export.json").write_text(json.dumps({"step": 4, "checksum": model_checksum(pipe)}))
    with caplog.at_level(logging.WARNING):
        load_pipeline(str(saved), "cpu")
        assert not caplog.records
        weights = load_file(saved / WEIGHTS)
        weights["conv_in.bias"][0] += 1e-3  # such as a flipped bit
        save_file(weights, saved / WEIGHTS)
        load_pipeline(str(saved), "cpu")
    assert "weights or configuration have changed since the run exported them" in caplog.text


def test_types_are_compared_with_annotations():
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
