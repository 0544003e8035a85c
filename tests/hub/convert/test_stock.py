from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_ddpm import DDPMPipeline
from tests.hub.convert.comparing import STEPS, WEIGHTS, files, make_old, noise, outputs


def test_old_and_new_stock_repositories_convert_to_equal_files(convert, stock_folder, tmp_path):
    convert("stock", stock_folder, tmp_path / "from_new")
    expected = load_file(stock_folder / WEIGHTS)
    make_old(stock_folder)
    convert("stock", stock_folder, tmp_path / "from_old")
    assert files(tmp_path / "from_old") == files(tmp_path / "from_new")
    written = load_file(tmp_path / "from_old" / WEIGHTS)
    assert written.keys() == expected.keys() and all(torch.equal(written[name], expected[name]) for name in expected)
    pipe = DDPMPipeline.from_pretrained(tmp_path / "from_old")
    assert pipe.class_names == ["zero"] and pipe.scheduler.config.variance_type == "fixed_large"
    outputs(tmp_path / "from_old", noise(1), STEPS)


def test_stock_shards_convert_to_one_file(convert, stock_folder, tmp_path):
    diffusers.DDPMPipeline.from_pretrained(stock_folder).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards" / "unet").glob("*-of-*"))) > 1
    convert("stock", tmp_path / "shards", tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (stock_folder / WEIGHTS).read_bytes()


def test_missing_stock_weights_are_not_initialized_randomly(convert, stock_folder, tmp_path):
    state = load_file(stock_folder / WEIGHTS)
    bias = state.pop("conv_in.bias")
    save_file(state, stock_folder / WEIGHTS)
    with pytest.raises(ValueError, match="1 of 144 tensors are missing in the file: conv_in.bias"):
        convert("stock", stock_folder, tmp_path / "out")
    save_file(state | {"conv_in.bias": bias, "conv_in.scale": bias.clone()}, stock_folder / WEIGHTS)
    with pytest.raises(ValueError, match="unknown tensors in the file: 1, conv_in.scale"):
        convert("stock", stock_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.hub
@pytest.mark.slow
def test_hub_repository_is_converted_by_its_id(hub, stock_folder, tmp_path):
    upload = "import sys, diffusers; diffusers.DDPMPipeline.from_pretrained(sys.argv[1]).push_to_hub('org/x')"
    assert hub.run("-c", upload, stock_folder)[0] == 0
    script = Path(__file__).parents[3] / "scripts" / "convert.py"
    code, _, errors = hub.run(script, "--from", "stock", "--input", "org/x", "--output", tmp_path / "out")
    assert code == 0, errors
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (stock_folder / WEIGHTS).read_bytes()
