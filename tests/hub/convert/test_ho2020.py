import numpy as np
import pytest
import torch

from hf_ddpm import DDPMPipeline
from hf_ddpm.hub.convert import ho2020
from hf_ddpm.hub.convert.hints import Hints
from tests.hub.convert.comparing import STEPS, assert_close, noise, outputs
from tests.hub.convert.ho2020_network import HoNetwork


def ho_outputs(network, x, t):
    return network(x.double().numpy().transpose(0, 2, 3, 1), t.numpy()).transpose(0, 3, 1, 2)


@pytest.mark.parametrize(("options", "index"), [([], 1), (["--weights", "ema"], 1), (["--weights", "raw"], 0)])
def test_tensorflow_checkpoint_gives_equal_outputs(convert, ho, tensorflow_file, tmp_path, options, index):
    convert("ho2020", tensorflow_file, tmp_path / "out", *options)
    assert_close(outputs(tmp_path / "out", noise(), STEPS), ho_outputs(ho[index], noise(), STEPS))


def test_pytorch_port_gives_equal_outputs(convert, ho, ported_file, tmp_path):
    convert("ho2020", ported_file, tmp_path / "out")
    assert_close(outputs(tmp_path / "out", noise(), STEPS), ho_outputs(ho[0], noise(), STEPS))
    pipe = DDPMPipeline.from_pretrained(tmp_path / "out")
    assert pipe.image_shape == (3, 32, 32)  # attention is at the second resolution, assumed to be 16x16
    assert pipe.scheduler.config.variance_type == "fixed_large" and len(pipe.scheduler) == 1000


def test_deeper_network_with_other_image_size(convert, tmp_path):
    network = HoNetwork(ch_mult=(1, 1, 2), num_res_blocks=2, attends=(0, 2), channels=1, out_ch=2)
    np.savez(tmp_path / "model.npz", **network.variables)
    arguments = ["--resolution", "28", "--beta_schedule", "quad", "--num_train_timesteps", "100"]
    convert("ho2020", tmp_path / "model.npz", tmp_path / "out", *arguments, "--prediction_type", "mean")
    pipe = DDPMPipeline.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        actual = pipe.unet(noise(1), STEPS % 100).sample.numpy()
    assert_close(actual, ho_outputs(network, noise(1), STEPS % 100))
    config = pipe.scheduler.config
    assert (config.variance_type, config.prediction_type) == ("learned", "mean")
    np.testing.assert_allclose(config.trained_betas, np.linspace(1e-4**0.5, 0.02**0.5, 100) ** 2)


# The configurations of google/ddpm-cifar10-32 and google/ddpm-cat-256, converted from the original checkpoints.
PUBLISHED = {
    "cifar10": ((1, 2, 2, 2), 1, 32, "fixed_large", 35_746_307),
    "lsun": ((1, 1, 2, 2, 4, 4), 4, 256, "fixed_small", 113_673_219),
}


@pytest.mark.parametrize(("mult", "attends", "size", "variance", "parameters"), PUBLISHED.values(), ids=PUBLISHED)
def test_networks_of_paper_are_recognized(mult, attends, size, variance, parameters):
    shapes = {"conv_in": (128, 3, 3, 3), "conv_out": (3, 128, 3, 3)}
    for level, width in enumerate(128 * m for m in mult):
        shapes |= {f"down.{level}.block.{block}.conv1": (width, width, 3, 3) for block in (0, 1)}
        shapes |= {f"down.{level}.downsample.conv": (width, width, 3, 3)} if level < len(mult) - 1 else {}
    shapes[f"down.{attends}.attn.0.q"] = shapes["conv_in"]
    weights = {f"{name}.weight": torch.zeros(1).expand(shape) for name, shape in shapes.items()}
    pipe = ho2020.plan(weights, Hints()).pipe
    published = {
        "act_fn": "silu", "attention_head_dim": None, "block_out_channels": [128 * m for m in mult],
        "center_input_sample": False, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1,
        "in_channels": 3, "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-06, "norm_num_groups": 32,
        "out_channels": 3, "sample_size": size, "time_embedding_type": "positional",
        "down_block_types": ["AttnDownBlock2D" if i == attends else "DownBlock2D" for i in range(len(mult))],
        "up_block_types": ["AttnUpBlock2D" if i == attends else "UpBlock2D" for i in reversed(range(len(mult)))],
    }  # fmt: skip
    for name, value in published.items():
        actual = pipe.unet.config[name]
        assert (list(actual) if isinstance(value, list) else actual) == value, name
    assert pipe.scheduler.config.variance_type == variance
    assert pipe.unet.num_parameters() == parameters
