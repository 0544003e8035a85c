"""The network of Nichol & Dhariwal 2021 computed from a checkpoint's own arrays, by torch's functions alone.

What converted networks are compared with: it shares neither code nor names with the U-Net of this package.
"""

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


class Network:
    """The network, block by block as the numbers in the names say.

    Args:
        tensors: The tensors of the file.
        layers: Residual blocks at a resolution on the way down.
        heads: Number of attention heads as a function of channels.
        is_new: Whether queries, keys and values are split before heads.
    """

    def __init__(self, tensors: Mapping[str, Tensor], layers: int, heads: Callable[[int], int], is_new: bool):
        self.tensors = tensors
        self.layers = layers
        self.heads = heads
        self.is_new = is_new

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """Computes the output, shape `(B, C', H, W)`, from images, steps `(B,)` and classes `(B,)`."""
        model_channels = self._at("time_embed.0.weight").shape[1]
        emb = self._linear("time_embed.2", F.silu(self._linear("time_embed.0", _sinusoids(t, model_channels))))
        if labels is not None:
            emb = emb + self._at("label_emb.weight")[labels]

        h = self._conv("input_blocks.0.0", x)
        skips, number = [h], 1
        while any(self._has(f"input_blocks.{number}.0", part) for part in ("op", "in_layers.2")):
            block = f"input_blocks.{number}"
            if self._has(f"{block}.0", "op"):
                h = self._conv(f"{block}.0.op", h, stride=2)
            else:
                is_last = number % (self.layers + 1) == 0
                h = self._residual(f"{block}.0", h, emb, _halve if is_last else None)
                h = self._attention(f"{block}.1", h)
            skips.append(h)
            number += 1

        h = self._residual("middle_block.0", h, emb)
        h = self._residual("middle_block.2", self._attention("middle_block.1", h), emb)

        for number in range(len(skips)):
            block = f"output_blocks.{number}"
            h = self._residual(f"{block}.0", torch.cat([h, skips.pop()], dim=1), emb)
            h = self._attention(f"{block}.1", h)
            for place in (1, 2):
                if self._has(f"{block}.{place}", "in_layers.2"):
                    h = self._residual(f"{block}.{place}", h, emb, _double)
                elif self._has(f"{block}.{place}", "conv"):
                    h = self._conv(f"{block}.{place}.conv", _double(h))
        return self._conv("out.2", F.silu(self._norm("out.0", h)))

    def _has(self, path: str, layer: str) -> bool:
        return f"{path}.{layer}.weight" in self.tensors

    def _at(self, name: str) -> Tensor:
        return self.tensors[name].float()

    def _linear(self, path: str, x: Tensor) -> Tensor:
        return F.linear(x, self._at(f"{path}.weight"), self._at(f"{path}.bias"))

    def _conv(self, path: str, x: Tensor, stride: int = 1) -> Tensor:
        kernel = self._at(f"{path}.weight")
        return F.conv2d(x, kernel, self._at(f"{path}.bias"), stride=stride, padding=kernel.shape[-1] // 2)

    def _norm(self, path: str, x: Tensor) -> Tensor:
        return F.group_norm(x, 32, self._at(f"{path}.weight"), self._at(f"{path}.bias"), eps=1e-5)

    def _residual(
        self, path: str, x: Tensor, emb: Tensor, resample: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        h = F.silu(self._norm(f"{path}.in_layers.0", x))
        if resample is not None:
            h, x = resample(h), resample(x)
        h = self._conv(f"{path}.in_layers.2", h)
        time = self._linear(f"{path}.emb_layers.1", F.silu(emb))[:, :, None, None]
        if time.shape[1] == h.shape[1]:
            h = self._norm(f"{path}.out_layers.0", h + time)
        else:
            scale, shift = time.chunk(2, dim=1)
            h = self._norm(f"{path}.out_layers.0", h) * (1 + scale) + shift
        h = self._conv(f"{path}.out_layers.3", F.silu(h))
        return h + (self._conv(f"{path}.skip_connection", x) if self._has(path, "skip_connection") else x)

    def _attention(self, path: str, x: Tensor) -> Tensor:
        """Lets each pixel look at all others; does nothing where there is no such layer."""
        if not self._has(path, "qkv"):
            return x
        batch, width = x.shape[:2]
        count = self.heads(width)
        kernel, bias = self._at(f"{path}.qkv.weight").flatten(1), self._at(f"{path}.qkv.bias")
        all_three = torch.einsum("oi,bip->bop", kernel, self._norm(f"{path}.norm", x).flatten(2)) + bias[:, None]
        if self.is_new:
            q, k, v = (part.reshape(batch * count, width // count, -1) for part in all_three.chunk(3, dim=1))
        else:
            q, k, v = all_three.reshape(batch * count, 3 * width // count, -1).chunk(3, dim=1)
        looks = torch.einsum("bcq,bck->bqk", q, k) / math.sqrt(width // count)
        h = torch.einsum("bqk,bck->bcq", looks.softmax(dim=2), v).reshape(batch, width, -1)
        h = torch.einsum("oi,bip->bop", self._at(f"{path}.proj_out.weight").flatten(1), h)
        return x + (h + self._at(f"{path}.proj_out.bias")[:, None]).reshape(x.shape)


def _sinusoids(t: Tensor, channels: int) -> Tensor:
    half = channels // 2
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _halve(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


def _double(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
