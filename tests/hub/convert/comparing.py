"""Helpers for tests of conversions."""

import diffusers
import numpy as np
import torch
from safetensors.torch import load_file

from hf_ddpm import DDPMPipeline, UNet2DModel

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def assert_close(actual, expected):
    """Assert that outputs are equal up to 1e-5 times their standard deviation."""
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual / np.std(expected), expected / np.std(expected), rtol=0, atol=1e-5)


def outputs(folder, x, t, labels=None):
    """Return the output of our network loaded from a folder, after comparing it with the output of diffusers."""
    ours = DDPMPipeline.from_pretrained(folder).unet
    stock = diffusers.DDPMPipeline.from_pretrained(folder).unet
    assert type(ours) is UNet2DModel and type(stock) is diffusers.UNet2DModel
    with torch.no_grad():
        output = ours(x, t, labels).sample.numpy()
        assert_close(stock(x, t, labels).sample.numpy(), output)
    return output


def noise(channels=3, size=8):
    return torch.randn(2, channels, size, 2 * size, generator=torch.Generator().manual_seed(1))


STEPS = torch.tensor([3, 871])


def make_old(folder, change=lambda old: old):
    """Convert a repository to the format of google/ddpm-cifar10-32: flat, a pickle, old names of attention layers."""
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
