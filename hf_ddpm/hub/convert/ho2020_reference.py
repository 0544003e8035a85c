"""The network of Ho et al. 2020 computed from a checkpoint's own arrays, by torch's functions alone.

What converted networks are compared with: it shares neither code nor names with the U-Net of this package.
"""

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


class PyTorchLayers:
    """The layers of the port to PyTorch.

    Args:
        tensors: The tensors of the file.
        name: How the port's names read in the file.
    """

    def __init__(self, tensors: Mapping[str, Tensor], name: Callable[[str], str]):
        self.tensors = tensors
        self.name = name

    def __contains__(self, path: str) -> bool:
        return self.name(f"{path}.weight") in self.tensors

    def weight(self, path: str) -> Tensor:
        """Returns the weights of a layer."""
        return self.tensors[self.name(f"{path}.weight")].float()

    def bias(self, path: str) -> Tensor:
        """Returns the biases of a layer."""
        return self.tensors[self.name(f"{path}.bias")].float()

    def norm(self, path: str, x: Tensor) -> Tensor:
        """Normalizes 32 groups of channels."""
        return F.group_norm(x, 32, self.weight(path), self.bias(path), eps=1e-6)

    def conv(self, path: str, x: Tensor, stride: int = 1) -> Tensor:
        """Convolves 3x3, padded as TensorFlow does: with stride 2 below and to the right."""
        padded = F.pad(x, (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1))
        return F.conv2d(padded, self.kernel(path), self.bias(path), stride=stride)

    def kernel(self, path: str) -> Tensor:
        """Returns the kernel of a convolution, outputs first."""
        return self.weight(path)

    def nin(self, path: str, x: Tensor) -> Tensor:
        """Applies the same linear map at every pixel."""
        return F.conv2d(x, self.weight(path), self.bias(path))

    def dense(self, path: str, x: Tensor) -> Tensor:
        """Applies a linear map."""
        return F.linear(x, self.weight(path), self.bias(path))


class TensorFlowLayers(PyTorchLayers):
    """The layers of the original: inputs stand before outputs in its weights."""

    def kernel(self, path: str) -> Tensor:
        """Returns the kernel of a convolution, outputs first."""
        return torch.einsum("hwio->oihw", self.weight(path))

    def nin(self, path: str, x: Tensor) -> Tensor:
        """Applies the same linear map at every pixel."""
        return torch.einsum("bihw,io->bohw", x, self.weight(path)) + self.bias(path)[:, None, None]

    def dense(self, path: str, x: Tensor) -> Tensor:
        """Applies a linear map."""
        return x @ self.weight(path) + self.bias(path)


def forward(layers: PyTorchLayers, x: Tensor, t: Tensor, labels: None) -> Tensor:
    """Computes the network.

    Args:
        layers: Its layers; which there are decides its structure.
        x: Images, shape `(B, C, H, W)`.
        t: Steps, shape `(B,)`.
        labels: None: it knows no classes.

    Returns:
        Its output, shape `(B, C', H, W)`.
    """
    temb = layers.dense("temb.dense.0", _sinusoids(t, len(layers.bias("conv_in"))))
    temb = F.silu(layers.dense("temb.dense.1", F.silu(temb)))
    skips = [layers.conv("conv_in", x)]
    level = 0
    while f"down.{level}.block.0.conv1" in layers:
        block = 0
        while f"down.{level}.block.{block}.conv1" in layers:
            h = _resnet(layers, f"down.{level}.block.{block}", skips[-1], temb)
            skips.append(_attention(layers, f"down.{level}.attn.{block}", h))
            block += 1
        if f"down.{level}.downsample.conv" in layers:
            skips.append(layers.conv(f"down.{level}.downsample.conv", skips[-1], stride=2))
        level += 1

    h = _resnet(layers, "mid.block_1", skips[-1], temb)
    h = _attention(layers, "mid.attn_1", h)
    h = _resnet(layers, "mid.block_2", h, temb)

    for up in reversed(range(level)):
        for number in range(block + 1):
            h = _resnet(layers, f"up.{up}.block.{number}", torch.cat([h, skips.pop()], dim=1), temb)
            h = _attention(layers, f"up.{up}.attn.{number}", h)
        if f"up.{up}.upsample.conv" in layers:
            h = layers.conv(f"up.{up}.upsample.conv", h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
    return layers.conv("conv_out", F.silu(layers.norm("norm_out", h)))


def _sinusoids(t: Tensor, channels: int) -> Tensor:
    half = channels // 2
    frequencies = torch.exp(torch.arange(half) * -(math.log(10000) / (half - 1)))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _resnet(layers: PyTorchLayers, path: str, x: Tensor, temb: Tensor) -> Tensor:
    h = layers.conv(f"{path}.conv1", F.silu(layers.norm(f"{path}.norm1", x)))
    h = h + layers.dense(f"{path}.temb_proj", temb)[:, :, None, None]
    h = layers.conv(f"{path}.conv2", F.silu(layers.norm(f"{path}.norm2", h)))
    return h + (layers.nin(f"{path}.nin_shortcut", x) if f"{path}.nin_shortcut" in layers else x)


def _attention(layers: PyTorchLayers, path: str, x: Tensor) -> Tensor:
    """Lets each pixel look at all others; does nothing where there is no such layer."""
    if f"{path}.q" not in layers:
        return x
    h = layers.norm(f"{path}.norm", x)
    q, k, v = (layers.nin(f"{path}.{name}", h).flatten(2) for name in "qkv")
    looks = torch.einsum("bcq,bck->bqk", q, k) / math.sqrt(x.shape[1])
    h = torch.einsum("bqk,bck->bcq", looks.softmax(dim=2), v).reshape(x.shape)
    return x + layers.nin(f"{path}.proj_out", h)
