import json

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from hf_ddpm import DDPMPipeline
from hf_ddpm.config import parse_config
from hf_ddpm.presets import preset_names
from tests.conftest import load_script


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*preset_names()} - {"digits"}))
def test_each_preset_trains_and_samples_at_small_size(name, tmp_path):
    # At 32x32 with a quarter of the channels; all other options, such as streaming, come from the preset.
    pixels = np.random.default_rng(0).integers(0, 256, (4, 40, 36, 3), dtype=np.uint8)
    data = Dataset.from_dict({"image": [Image.fromarray(image) for image in pixels]})
    (tmp_path / "data").mkdir()
    data.to_parquet(str(tmp_path / "data" / "train-00000-of-00001.parquet"))
    channels = [
        str(width // 4) for width in parse_config(["--preset", name, "--dataset", "any"]).model.block_out_channels
    ]
    words = ["--preset", name, "--dataset", str(tmp_path / "data"), "--output_dir", str(tmp_path / "run")]
    few = ["--train_batch_size", "2", "--max_train_steps", "1", "--num_samples", "1", "--num_inference_steps", "2"]
    small = ["--resolution", "32", "--block_out_channels", *channels, "--norm_num_groups", "4"]
    assert load_script("train").main([*words, *few, *small]) == 0
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "finished"
    unet = DDPMPipeline.from_pretrained(tmp_path / "run").unet
    assert list(unet.config.block_out_channels) == [int(width) for width in channels]
    assert Image.open(tmp_path / "run" / "samples.png").size == (64 + 2 * 6, 64 + 2 * 6)  # with gaps
