import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hf_ddpm import DDPMPipeline
from hf_ddpm.hub.convert import ho2020, improved_diffusion
from hf_ddpm.hub.convert.hints import Hints
from tests.hub.convert.comparing import STEPS, WEIGHTS, assert_close, noise, outputs
from tests.hub.convert.ho2020_network import HoNetwork
from tests.hub.convert.improved_diffusion_network import ImprovedNetwork

IMPROVED = {
    "one head": ({"attends": (0, 1)}, "--num_heads 1"),
    "four heads, the default": ({"heads": lambda width: 4, "num_res_blocks": 2}, ""),
    "heads of 16 channels": ({"heads": lambda width: width // 16, "attends": (0, 1)}, "--num_head_channels 16"),
    "new attention order": (
        {"heads": lambda width: 2, "new_order": True},
        "--num_heads 2 --use_new_attention_order true",
    ),
    "timestep embedding added, not scaled": ({"scale_shift": False}, "--num_heads 1"),
    "learned range": ({"learn_sigma": True, "in_channels": 1}, "--num_heads 1"),
    "classes": ({"num_classes": 5}, "--num_heads 1"),
    "resampling residual blocks": (
        {"resblock_updown": True, "attends": (0, 1, 2), "channel_mult": (1, 2, 2)},
        "--num_heads 1",
    ),
    "attention only in the middle": (
        {"channel_mult": (1, 2, 3), "attends": (), "heads": lambda width: 3},
        "--num_heads 3",
    ),
    "one resolution": (
        {"channel_mult": (1,), "attends": (0,), "num_res_blocks": 2, "heads": lambda width: 2},
        "--num_heads 2",
    ),
}


def save_improved(path, **options):
    network = ImprovedNetwork(**options)
    torch.save({name: value.float() for name, value in network.state_dict().items()}, path)
    return network


@pytest.mark.parametrize(("options", "arguments"), IMPROVED.values(), ids=IMPROVED)
def test_improved_diffusion_checkpoint_gives_equal_outputs(convert, tmp_path, options, arguments):
    network = save_improved(tmp_path / "model.pt", **options)
    convert("improved-diffusion", tmp_path / "model.pt", tmp_path / "out", "--resolution", "16", *arguments.split())
    x = noise(options.get("in_channels", 3))
    labels = torch.tensor([4, 1]) if "num_classes" in options else None
    assert_close(outputs(tmp_path / "out", x, STEPS, labels), network(x, STEPS, labels).numpy())
    pipe = DDPMPipeline.from_pretrained(tmp_path / "out")
    assert pipe.scheduler.config.variance_type == ("learned_range" if "learn_sigma" in options else "fixed_large")
    assert pipe.unet.config.norm_eps == 1e-5  # too small to change the outputs


def cosine(steps):
    u = np.arange(steps + 1) / steps
    alpha_bar = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


def linear(steps):
    return np.linspace(0.1 / steps, 20 / steps, steps)


@pytest.mark.parametrize(("name", "betas"), [("squaredcos_cap_v2", cosine), ("linear", linear)])
def test_only_steps_with_integer_network_times_are_kept(convert, tmp_path, name, betas):
    # The network gets 1000 t / 4000, an integer at every fourth step. The noise of the steps between is accumulated.
    network = save_improved(tmp_path / "model.pt")
    arguments = ["--resolution", "16", "--num_heads", "1", "--num_train_timesteps", "4000", "--beta_schedule", name]
    convert("improved-diffusion", tmp_path / "model.pt", tmp_path / "out", *arguments)
    scheduler = DDPMPipeline.from_pretrained(tmp_path / "out").scheduler
    stock = diffusers.DDPMPipeline.from_pretrained(tmp_path / "out").scheduler
    kept = np.cumprod(1 - betas(4000))[::4]
    assert len(scheduler) == len(kept) == stock.config.num_train_timesteps
    np.testing.assert_allclose(scheduler.diffusion.alphas_cumprod, kept, rtol=1e-9)
    np.testing.assert_allclose(stock.alphas_cumprod, kept, rtol=2e-4, atol=1e-9)
    # Step 2000 of 4000 is step 500 of the converted process.
    network_time = torch.tensor([2000]) * (1000.0 / 4000)
    expected = network(noise()[:1], network_time).numpy()
    assert_close(outputs(tmp_path / "out", noise()[:1], torch.tensor([500])), expected)


def test_timesteps_without_rescaling(convert, tmp_path):
    save_improved(tmp_path / "model.pt")
    arguments = (
        "--resolution 16 --num_heads 1 --num_train_timesteps 400 --rescale_timesteps false --variance_type fixed_small"
    )
    convert("improved-diffusion", tmp_path / "model.pt", tmp_path / "out", *arguments.split())
    scheduler = DDPMPipeline.from_pretrained(tmp_path / "out").scheduler
    np.testing.assert_allclose(scheduler.diffusion.betas, linear(400))
    assert scheduler.config.variance_type == "fixed_small"


def test_image_sizes_match_create_model():
    for mult, size in [((1, 2, 2, 2), 32), ((1, 2, 3, 4), 64), ((1, 1, 2, 3, 4), 128), ((1, 1, 2, 2, 4, 4), 256)]:
        state = ImprovedNetwork(channel_mult=mult, attends=()).state_dict()
        assert improved_diffusion.plan(state, Hints()).pipe.unet.config.sample_size == size


def test_half_precision_is_converted_to_float32(convert, tmp_path):
    state = {name: value.half() for name, value in ImprovedNetwork().state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "model.pt")
    convert("improved-diffusion", tmp_path / "model.pt", tmp_path / "out", "--resolution", "16", "--num_heads", "1")
    written = load_file(tmp_path / "out" / WEIGHTS)
    assert {value.dtype for value in written.values()} == {torch.float32}
    assert torch.equal(written["conv_in.weight"], state["input_blocks.0.0.weight"].float())


UNSUPPORTED = {
    "heads of different sizes": (
        {"attends": (0, 1)},
        r"--num_heads 4: heads of different sizes at \[32, 64\] channels are not supported; expected 1",
    ),
    "fractional head size": ({"num_heads": 3}, r"--num_heads 3: expected a divisor of \[64\]"),
    "resampling blocks": ({"resblock_updown": True}, "resblock_updown"),
    "upsampling": ({"in_channels": 6}, "6 input channels are not supported, nor are super-resolution networks"),
    "first resolution": ({"channel_mult": (2, 2)}, r"channel_mult\[0\]"),
    "image size": ({}, r"--resolution is missing: cannot be inferred from the channels \(32, 64\)"),
    "odd image size": ({"resolution": 33}, "resolution.33.*: .*a multiple of 2"),
    "variance": ({"variance_type": "learned"}, "variance_type.*learned.*: .*fixed_small or fixed_large"),
    "steps": ({"num_train_timesteps": 1500}, "num_train_timesteps.1500.*: .*a multiple of 1000"),
    "schedule": ({"beta_schedule": "quad"}, "beta_schedule.*quad.*: .*linear or squaredcos_cap_v2"),
    "prediction": ({"prediction_type": "mean"}, "prediction_type.*mean.*: .*epsilon or sample"),
    "weights": ({"weights": "ema"}, "weights.*ema.*: does not apply to improved-diffusion checkpoints"),
    "two options": (
        {"num_heads": 2, "num_head_channels": 16},
        "num_head_channels.16.*: cannot be combined with --num_h",
    ),
}


@pytest.mark.parametrize(("options", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported_options_raise_one_line_errors(options, message):
    hints = {name: options[name] for name in options if name in Hints.__dataclass_fields__}
    if "resolution is missing" not in message:
        hints.setdefault("resolution", 16)
    state = ImprovedNetwork(**{name: value for name, value in options.items() if name not in hints}).state_dict()
    with pytest.raises(ValueError, match=message) as caught:
        improved_diffusion.plan(state, Hints(**hints))
    assert "\n" not in str(caught.value)


def test_errors_name_unsupported_variants():
    state = ImprovedNetwork().state_dict()
    without = {name: value for name, value in state.items() if ".op." not in name and not name.endswith("1.2.conv")}
    with pytest.raises(ValueError, match="conv_resample=False"):
        improved_diffusion.plan(without, Hints())
    state["input_blocks.3.0.skip_connection.weight"] = torch.zeros(64, 32, 3, 3)
    with pytest.raises(ValueError, match="use_conv=True"):
        improved_diffusion.plan(state, Hints())
    ho = HoNetwork().ported()
    with pytest.raises(ValueError, match="conv_shortcut=True"):
        ho2020.plan(ho | {"down.1.block.0.conv_shortcut.weight": np.zeros((64, 32, 3, 3))}, Hints())
    with pytest.raises(ValueError, match="resamp_with_conv=False"):
        ho2020.plan({name: value for name, value in ho.items() if "sample.conv" not in name}, Hints())
