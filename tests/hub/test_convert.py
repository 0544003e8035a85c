"""Checkpoints of others become networks that compute the same."""

import os
import signal
import sys

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_ddpm import DDPMPipeline, UNet2DModel
from hf_ddpm.hub.convert import ho2020, improved_diffusion
from hf_ddpm.hub.convert.hints import Hints
from hf_ddpm.launch import run_script
from tests.conftest import TINY_UNET, load_script
from tests.hub.ho2020_network import HoNetwork
from tests.hub.improved_diffusion_network import ImprovedNetwork

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def convert():
    main = load_script("convert").main
    return lambda layout, source, output, *words: main(
        ["--from", layout, "--input", str(source), "--output", str(output), *words]
    )


def close(found, expected):
    """Whether outputs are equal to 1e-5, in units of a typical output."""
    assert found.shape == expected.shape
    np.testing.assert_allclose(found / np.std(expected), expected / np.std(expected), rtol=0, atol=1e-5)


def outputs(folder, x, t, labels=None):
    """What our network of a folder makes of some input, checked against diffusers'."""
    ours = DDPMPipeline.from_pretrained(folder).unet
    stock = diffusers.DDPMPipeline.from_pretrained(folder).unet
    assert type(ours) is UNet2DModel and type(stock) is diffusers.UNet2DModel
    with torch.no_grad():
        found = ours(x, t, labels).sample.numpy()
        close(stock(x, t, labels).sample.numpy(), found)
    return found


def noise(channels=3, size=8):
    return torch.randn(2, channels, size, 2 * size, generator=torch.Generator().manual_seed(1))


STEPS = torch.tensor([3, 871])


# ----- Ho et al. 2020


@pytest.fixture(scope="module")
def ho():
    """A network, and another one whose variables play the averages."""
    return HoNetwork(seed=0), HoNetwork(seed=1)


@pytest.fixture(scope="module")
def tensorflow_file(ho, tmp_path_factory):
    raw, averaged = ho
    arrays = dict(raw.variables) | {"global_step": np.int64(7), "beta1_power": np.float32(0.9)}
    arrays |= {f"{name}/ExponentialMovingAverage": value for name, value in averaged.variables.items()}
    arrays |= {f"{name}/{slot}": value for name, value in raw.variables.items() for slot in ("Adam", "Adam_1")}
    path = tmp_path_factory.mktemp("tensorflow") / "model.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def ported_file(ho, tmp_path_factory):
    path = tmp_path_factory.mktemp("port") / "model-790000.ckpt"
    torch.save({name: torch.from_numpy(value) for name, value in ho[0].ported().items()}, path)
    return path


def ho_outputs(network, x, t):
    return network(x.double().numpy().transpose(0, 2, 3, 1), t.numpy()).transpose(0, 3, 1, 2)


@pytest.mark.parametrize(("words", "which"), [([], 1), (["--weights", "ema"], 1), (["--weights", "raw"], 0)])
def test_a_tensorflow_checkpoint_computes_the_same(convert, ho, tensorflow_file, tmp_path, words, which):
    convert("ho2020", tensorflow_file, tmp_path / "out", *words)
    close(outputs(tmp_path / "out", noise(), STEPS), ho_outputs(ho[which], noise(), STEPS))


def test_its_port_to_pytorch_computes_the_same(convert, ho, ported_file, tmp_path):
    convert("ho2020", ported_file, tmp_path / "out")
    close(outputs(tmp_path / "out", noise(), STEPS), ho_outputs(ho[0], noise(), STEPS))
    pipe = DDPMPipeline.from_pretrained(tmp_path / "out")
    assert pipe.image_shape == (3, 32, 32)  # attention, at 16x16, is one resolution below
    assert pipe.scheduler.config.variance_type == "fixed_large" and len(pipe.scheduler) == 1000


def test_deeper_networks_and_other_images(convert, tmp_path):
    network = HoNetwork(ch_mult=(1, 1, 2), num_res_blocks=2, attends=(0, 2), channels=1, out_ch=2)
    np.savez(tmp_path / "model.npz", **network.variables)
    words = ["--resolution", "28", "--beta_schedule", "quad", "--num_train_timesteps", "100"]
    convert("ho2020", tmp_path / "model.npz", tmp_path / "out", *words, "--prediction_type", "mean")
    pipe = DDPMPipeline.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        found = pipe.unet(noise(1), STEPS % 100).sample.numpy()
    close(found, ho_outputs(network, noise(1), STEPS % 100))
    config = pipe.scheduler.config
    assert (config.variance_type, config.prediction_type) == ("learned", "mean")
    np.testing.assert_allclose(config.trained_betas, np.linspace(1e-4**0.5, 0.02**0.5, 100) ** 2)


# The configurations of google/ddpm-cifar10-32 and google/ddpm-cat-256, which are these checkpoints.
PUBLISHED = {
    "cifar10": ((1, 2, 2, 2), 1, 32, "fixed_large", 35_746_307),
    "lsun": ((1, 1, 2, 2, 4, 4), 4, 256, "fixed_small", 113_673_219),
}


@pytest.mark.parametrize(("mult", "attends", "size", "variance", "parameters"), PUBLISHED.values(), ids=PUBLISHED)
def test_the_networks_of_the_paper_are_recognized(mult, attends, size, variance, parameters):
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
        found = pipe.unet.config[name]
        assert (list(found) if isinstance(value, list) else found) == value, name
    assert pipe.scheduler.config.variance_type == variance
    assert pipe.unet.num_parameters() == parameters


# ----- Nichol & Dhariwal 2021

IMPROVED = {
    "one head": ({"attends": (0, 1)}, "--num_heads 1"),
    "four heads, the default": ({"heads": lambda width: 4, "num_res_blocks": 2}, ""),
    "heads of 16 channels": ({"heads": lambda width: width // 16, "attends": (0, 1)}, "--num_head_channels 16"),
    "the new order": (
        {"heads": lambda width: 2, "new_order": True},
        "--num_heads 2 --use_new_attention_order true",
    ),
    "time added, not scaled": ({"scale_shift": False}, "--num_heads 1"),
    "learned range": ({"learn_sigma": True, "in_channels": 1}, "--num_heads 1"),
    "classes": ({"num_classes": 5}, "--num_heads 1"),
    "residual blocks that resample": (
        {"resblock_updown": True, "attends": (0, 1, 2), "channel_mult": (1, 2, 2)},
        "--num_heads 1",
    ),
    "attention in the middle alone": (
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


@pytest.mark.parametrize(("options", "words"), IMPROVED.values(), ids=IMPROVED)
def test_an_improved_diffusion_checkpoint_computes_the_same(convert, tmp_path, options, words):
    network = save_improved(tmp_path / "model.pt", **options)
    convert("improved-diffusion", tmp_path / "model.pt", tmp_path / "out", "--resolution", "16", *words.split())
    x = noise(options.get("in_channels", 3))
    labels = torch.tensor([4, 1]) if "num_classes" in options else None
    close(outputs(tmp_path / "out", x, STEPS, labels), network(x, STEPS, labels).numpy())
    pipe = DDPMPipeline.from_pretrained(tmp_path / "out")
    assert pipe.scheduler.config.variance_type == ("learned_range" if "learn_sigma" in options else "fixed_large")
    assert pipe.unet.config.norm_eps == 1e-5  # too little to be seen in the outputs


def cosine(steps):
    u = np.arange(steps + 1) / steps
    alpha_bar = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


def linear(steps):
    return np.linspace(0.1 / steps, 20 / steps, steps)


@pytest.mark.parametrize(("name", "betas"), [("squaredcos_cap_v2", cosine), ("linear", linear)])
def test_more_steps_become_those_at_whole_numbers(convert, tmp_path, name, betas):
    # The network is shown 1000 t / 4000: a whole number at every fourth step. Between those, noise adds up.
    network = save_improved(tmp_path / "model.pt")
    words = ["--resolution", "16", "--num_heads", "1", "--num_train_timesteps", "4000", "--beta_schedule", name]
    convert("improved-diffusion", tmp_path / "model.pt", tmp_path / "out", *words)
    scheduler = DDPMPipeline.from_pretrained(tmp_path / "out").scheduler
    stock = diffusers.DDPMPipeline.from_pretrained(tmp_path / "out").scheduler
    kept = np.cumprod(1 - betas(4000))[::4]
    assert len(scheduler) == len(kept) == stock.config.num_train_timesteps
    np.testing.assert_allclose(scheduler.diffusion.alphas_cumprod, kept, rtol=1e-9)
    np.testing.assert_allclose(stock.alphas_cumprod, kept, rtol=2e-4, atol=1e-9)
    # Step 2000 of 4000 is step 500 of the converted process.
    shown = torch.tensor([2000]) * (1000.0 / 4000)
    close(outputs(tmp_path / "out", noise()[:1], torch.tensor([500])), network(noise()[:1], shown).numpy())


def test_steps_can_be_shown_as_they_are(convert, tmp_path):
    save_improved(tmp_path / "model.pt")
    words = (
        "--resolution 16 --num_heads 1 --num_train_timesteps 400 --rescale_timesteps false --variance_type fixed_small"
    )
    convert("improved-diffusion", tmp_path / "model.pt", tmp_path / "out", *words.split())
    scheduler = DDPMPipeline.from_pretrained(tmp_path / "out").scheduler
    np.testing.assert_allclose(scheduler.diffusion.betas, linear(400))
    assert scheduler.config.variance_type == "fixed_small"


def test_image_sizes_are_those_of_create_model():
    for mult, size in [((1, 2, 2, 2), 32), ((1, 2, 3, 4), 64), ((1, 1, 2, 3, 4), 128), ((1, 1, 2, 2, 4, 4), 256)]:
        state = ImprovedNetwork(channel_mult=mult, attends=()).state_dict()
        assert improved_diffusion.plan(state, Hints()).pipe.unet.config.sample_size == size


def test_half_precision_becomes_single(convert, tmp_path):
    state = {name: value.half() for name, value in ImprovedNetwork().state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "model.pt")
    convert("improved-diffusion", tmp_path / "model.pt", tmp_path / "out", "--resolution", "16", "--num_heads", "1")
    written = load_file(tmp_path / "out" / WEIGHTS)
    assert {value.dtype for value in written.values()} == {torch.float32}
    assert torch.equal(written["conv_in.weight"], state["input_blocks.0.0.weight"].float())


UNSUPPORTED = {
    "heads of different sizes": ({"attends": (0, 1)}, r"num_heads=4 with attention at \[32, 64\] channels is not supp"),
    "no whole heads": ({"num_heads": 3}, r"num_heads=3 is not allowed: a divisor of \[64\]"),
    "resampling blocks": ({"resblock_updown": True}, "resblock_updown"),
    "upsampling": ({"in_channels": 6}, "images of 6 channels are not supported, nor are networks that upsample images"),
    "first resolution": ({"channel_mult": (2, 2)}, r"channel_mult\[0\]"),
    "image size": ({}, r"resolution is missing: the channels \(32, 64\)"),
    "odd image size": ({"resolution": 33}, "resolution=33 is not allowed: a multiple of 2"),
    "variance": ({"variance_type": "learned"}, "variance_type='learned' is not allowed: fixed_small or fixed_large"),
    "steps": ({"num_train_timesteps": 1500}, "num_train_timesteps=1500 is not allowed: a multiple of 1000"),
    "schedule": ({"beta_schedule": "quad"}, "beta_schedule='quad' is not allowed: linear or squaredcos_cap_v2"),
    "prediction": ({"prediction_type": "mean"}, "prediction_type='mean' is not allowed: epsilon or sample"),
    "weights": ({"weights": "ema"}, "weights='ema' is not allowed: improved-diffusion checkpoints leave it no choice"),
    "two kinds": ({"num_heads": 2, "num_head_channels": 16}, "num_head_channels=16 is not allowed: num_heads says"),
}


@pytest.mark.parametrize(("options", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_what_is_not_supported_is_said_in_one_line(options, message):
    hints = {name: options[name] for name in options if name in Hints.__dataclass_fields__}
    if "resolution is missing" not in message:
        hints.setdefault("resolution", 16)
    state = ImprovedNetwork(**{name: value for name, value in options.items() if name not in hints}).state_dict()
    with pytest.raises(ValueError, match=message) as caught:
        improved_diffusion.plan(state, Hints(**hints))
    assert "\n" not in str(caught.value)


def test_other_variants_of_their_code_are_refused_by_name():
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


# ----- Repositories of diffusers


@pytest.fixture
def stock_folder(tmp_path):
    torch.manual_seed(0)
    scheduler = diffusers.DDPMScheduler(variance_type="fixed_large")
    pipe = diffusers.DDPMPipeline(diffusers.UNet2DModel(**TINY_UNET), scheduler)
    pipe.register_to_config(id2label={"0": "zero"})
    pipe.save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


def make_old(folder, change=lambda old: old):
    """Makes a repository look as google/ddpm-cifar10-32 does: flat, a pickle, the first names of attention's layers."""
    old = {}
    for key, value in load_file(folder / WEIGHTS).items():
        for new, former in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            key = key.replace(f".{new}.", f".{former}.")
        old[key] = value
    (folder / WEIGHTS).unlink()
    torch.save(change(old), folder / "diffusion_pytorch_model.bin")
    for name in ("unet/config.json", "scheduler/scheduler_config.json"):
        (folder / name).rename(folder / name.split("/")[1])
        (folder / name).parent.rmdir()


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_stock_repositories_old_and_new_become_the_same(convert, stock_folder, tmp_path):
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


def test_stock_shards_become_one_file(convert, stock_folder, tmp_path):
    diffusers.DDPMPipeline.from_pretrained(stock_folder).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards" / "unet").glob("*-of-*"))) > 1
    convert("stock", tmp_path / "shards", tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (stock_folder / WEIGHTS).read_bytes()


def test_stock_weights_that_are_missing_are_not_made_up(convert, stock_folder, tmp_path):
    state = load_file(stock_folder / WEIGHTS)
    bias = state.pop("conv_in.bias")
    save_file(state, stock_folder / WEIGHTS)
    with pytest.raises(ValueError, match="the file lacks 1 of 144 tensors: conv_in.bias"):
        convert("stock", stock_folder, tmp_path / "out")
    save_file(state | {"conv_in.bias": bias, "conv_in.scale": bias.clone()}, stock_folder / WEIGHTS)
    with pytest.raises(ValueError, match="the file holds 1 tensors of no known use: conv_in.scale"):
        convert("stock", stock_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ----- Whatever the layout


def damage(ported_file, path, change):
    state = torch.load(ported_file, weights_only=True)
    change(state)
    torch.save(state, path)


DAMAGES = {
    "missing": (lambda s: s.pop("mid.attn_1.q.bias"), r"the file lacks 1 of \d+ tensors: mid.attn_1.q.bias"),
    "unknown": (
        lambda s: s.update({"mid.attn_2.q.bias": torch.zeros(1)}),
        "the file holds 1 tensors of no known use: mid.attn_2.q.bias",
    ),
    "shape": (
        lambda s: s.update({"norm_out.weight": torch.zeros(31)}),
        r"norm_out.weight of shape \(31,\) does not fit conv_norm_out.weight of \(32,\)",
    ),
    "dimensions": (
        lambda s: s.update({"conv_in.weight": torch.zeros(32)}),
        r"conv_in.weight of shape \(32,\) is not allowed: 4 dimensions",
    ),
    "values": (lambda s: s["norm_out.bias"].fill_(float("nan")), "norm_out.bias holds values that are not finite"),
    "kind": (lambda s: s.pop("conv_in.weight"), "the file holds no conv_in.weight: it is no checkpoint of that kind"),
    "text": (lambda s: s.update(epoch="3"), "is no checkpoint: 'epoch' is of type str, only tensors are allowed"),
    "nothing": (lambda s: s.clear(), "is no checkpoint: it holds no tensors by name"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_wrong_checkpoint_is_one_line(convert, ported_file, tmp_path, change, message):
    damage(ported_file, tmp_path / "damaged.ckpt", change)
    with pytest.raises(ValueError, match=message) as caught:
        convert("ho2020", tmp_path / "damaged.ckpt", tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("shape", "text"), [((190, 64, 1), r"\(190, 64, 1\)"), ((), r"\(\)")])
def test_tensors_that_cannot_be_taken_apart_are_named(shape, text):
    state = ImprovedNetwork().state_dict() | {"middle_block.1.qkv.weight": torch.zeros(shape)}
    conversion = improved_diffusion.plan(state, Hints(resolution=16, num_heads=1))
    with pytest.raises(ValueError, match=rf"middle_block.1.qkv.weight of shape {text} does not fit"):
        conversion.fill()


@pytest.mark.parametrize("name", ["none.pt", "none.npz", "folder"])
def test_what_cannot_be_read_is_one_line(convert, tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=f"input='.*{name}' cannot be read: (No such file|Is a dir)"):
        convert("ho2020", tmp_path / name, tmp_path / "out")


@pytest.mark.parametrize("name", ["junk.pt", "junk.npz", "junk.safetensors"])
def test_junk_is_one_line(convert, tmp_path, name):
    (tmp_path / name).write_bytes(b"junk" * 100)
    with pytest.raises(ValueError, match=f"input='.*{name}' is no checkpoint: ") as caught:
        convert("improved-diffusion", tmp_path / name, tmp_path / "out")
    assert "\n" not in str(caught.value)


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_code_in_a_checkpoint_is_not_run(convert, ported_file, stock_folder, tmp_path):
    marker = tmp_path / "marker"
    state = torch.load(ported_file, weights_only=True)
    torch.save(state | {"code": Malicious(marker)}, tmp_path / "model.pt")
    np.savez(tmp_path / "model.npz", code=np.array([Malicious(marker)], dtype=object))
    make_old(stock_folder, lambda old: old | {"code": Malicious(marker)})
    for layout, source, message in [
        ("ho2020", "model.pt", r"it holds more than numbers \(GLOBAL posix.mkdir\); nothing of it was run"),
        ("improved-diffusion", "model.pt", "GLOBAL posix.mkdir"),
        ("ho2020", "model.npz", r"more than numbers \(Object arrays\)"),
        ("stock", "stock", "cannot be loaded"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            convert(layout, tmp_path / source, tmp_path / "out")
        assert "\n" not in str(caught.value)
    assert not marker.exists() and not (tmp_path / "out").exists()
    torch.load(tmp_path / "model.pt", weights_only=False)
    assert marker.exists()  # the trap works


def test_a_dry_run_lists_both_sides_and_writes_nothing(convert, tensorflow_file, tmp_path, capsys):
    arrays = dict(np.load(tensorflow_file))
    del arrays["model/mid/attn_1/k/b/ExponentialMovingAverage"]
    arrays["model/extra/W"] = np.zeros((3, 3))
    np.savez(tmp_path / "model.npz", **arrays)
    before = files(tmp_path)
    with pytest.raises(ValueError, match="the file lacks 1 of"):
        convert("ho2020", tmp_path / "model.npz", tmp_path / "out", "--dry_run")
    lines = capsys.readouterr().out.splitlines()
    assert "  model/conv_in/W/ExponentialMovingAverage -> conv_in.weight" in lines
    assert "  block_out_channels: (32, 64)" in lines and "  variance_type: fixed_large" in lines
    gone = lines.index("1 of the network that the file lacks:")
    assert lines[gone + 1] == "  model/mid/attn_1/k/b/ExponentialMovingAverage -> mid_block.attentions.0.to_k.bias"
    unknown = lines.index("2 of the file of no known use:")
    assert lines[unknown + 1 : unknown + 3] == ["  model/extra/W", "  model/mid/attn_1/k/b"]  # one has lost its average
    aside = lines[[line.endswith("left aside:") for line in lines].index(True) :]
    assert {"  global_step", "  model/conv_in/W", "  model/conv_in/W/Adam_1"} <= set(aside)
    assert convert("ho2020", tensorflow_file, tmp_path / "out", "--dry_run", "true") == 0
    assert files(tmp_path) == before


def test_every_conversion_is_compared_with_the_original(convert, ported_file, tmp_path, monkeypatch):
    monkeypatch.setitem(ho2020.LAYERS, "to_q", "k")
    monkeypatch.setitem(ho2020.LAYERS, "to_k", "q")
    with pytest.raises(ValueError, match="the converted network differs from the checkpoint's by .*, not 0.0001"):
        convert("ho2020", ported_file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_left_alone(convert, ported_file, tmp_path):
    (tmp_path / "out").mkdir()
    convert("ho2020", ported_file, tmp_path / "out")  # empty: it may be there
    before = files(tmp_path / "out")
    for output, reason in [(tmp_path / "out", "it holds something"), (ported_file, "it is a file")]:
        with pytest.raises(ValueError, match=f"output='.*' is not allowed: {reason}"):
            convert("ho2020", ported_file, output)
    assert files(tmp_path / "out") == before


def test_a_kill_or_an_error_leaves_nothing_half_written(convert, ported_file, tmp_path, monkeypatch):
    def interrupted(end):
        def save_pretrained(pipe, folder):
            (folder / "unet").mkdir(parents=True)
            for name in ("config.json", "stray.safetensors"):
                (folder / "unet" / name).write_text("{")
            end()

        return save_pretrained

    def fail():
        raise OSError("disk full")

    monkeypatch.setattr(DDPMPipeline, "save_pretrained", interrupted(fail))
    with pytest.raises(OSError, match="disk full"):
        convert("ho2020", ported_file, tmp_path / "out")
    assert not list(tmp_path.iterdir())

    monkeypatch.setattr(DDPMPipeline, "save_pretrained", interrupted(lambda: os.kill(os.getpid(), signal.SIGKILL)))
    if os.fork() == 0:
        try:
            convert("ho2020", ported_file, tmp_path / "out")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGKILL
    assert not (tmp_path / "out").exists() and list(tmp_path.iterdir())

    monkeypatch.undo()
    convert("ho2020", ported_file, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not list((tmp_path / "out").rglob("stray*"))


def test_the_script_says_what_is_wrong_and_exits_with_2(convert, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["convert.py", "--from", "stock", "--input", "x", "--output", str(tmp_path), "--num_heads", "2"]
    )
    with pytest.raises(SystemExit) as caught:
        run_script(load_script("convert").main)
    assert caught.value.code == 2
    message = "convert.py: error: num_heads=2 is not allowed: stock checkpoints leave it no choice\n"
    assert capsys.readouterr().err == message
