"""Stages of the U-Net, one per resolution: down, middle and up."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_ddpm.models.blocks import Attention, Downsample, ResnetBlock, Upsample


class Stage(nn.Module):
    """Base class of the stages: residual blocks, attentions, and gradient checkpointing of the residual blocks.

    Args:
        in_channels: Channels of the input of each residual block.
        out_channels: Channels of their outputs.
        head_dim: Channels per attention head; None for no attention.
        attn_groups: Number of groups of the attentions' normalizations; None for no normalization.
        eps: Epsilon of the normalizations.
        scale: Divisor of the outputs of residual blocks and attentions.
        **resnet: `time_dim`, `groups`, `dropout` and `scale_shift` of `ResnetBlock`.
    """

    _gradient_checkpointing_func: Callable[..., Tensor]

    def __init__(
        self,
        in_channels: list[int],
        out_channels: int,
        *,
        head_dim: int | None,
        attn_groups: int | None,
        eps: float,
        scale: float = 1.0,
        **resnet: Any,
    ):
        super().__init__()
        resnets, attentions = [], []
        for channels in in_channels:
            resnets.append(ResnetBlock(channels, out_channels, eps=eps, scale=scale, **resnet))
            if head_dim is not None:
                attentions.append(Attention(out_channels, head_dim=head_dim, groups=attn_groups, eps=eps, scale=scale))
        # Attentions are registered first, as in diffusers: see the docstring of blocks.py.
        self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList(resnets)
        self.gradient_checkpointing = False

    def attend(self, i: int, x: Tensor) -> Tensor:
        """Apply the attention after residual block `i`, if this stage has attention."""
        return self.attentions[i](x) if self.attentions else x

    def run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        """Call a block; with gradient checkpointing, the backward pass recomputes its activations."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)


class DownStage(Stage):
    """One resolution of the down path: residual blocks, optionally each with attention, then downsampling.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of all outputs.
        layers: Number of residual blocks.
        head_dim: Channels per attention head; None for no attention.
        downsample: `conv`, `resnet`, or None at the lowest resolution.
        padding: Padding of the downsampling convolution.
        **resnet: `time_dim`, `groups`, `eps`, `dropout` and `scale_shift` of `ResnetBlock`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        layers: int,
        head_dim: int | None,
        downsample: str | None,
        padding: int,
        **resnet: Any,
    ):
        channels = [in_channels, *[out_channels] * (layers - 1)]
        super().__init__(channels, out_channels, head_dim=head_dim, attn_groups=resnet["groups"], **resnet)
        self.downsamplers = nn.ModuleList()
        if downsample == "conv":
            self.downsamplers.append(Downsample(out_channels, padding))
        elif downsample == "resnet":
            self.downsamplers.append(ResnetBlock(out_channels, out_channels, resample=nn.AvgPool2d(2), **resnet))

    def forward(self, x: Tensor, emb: Tensor) -> tuple[Tensor, ...]:
        """Map `(B, C, H, W)` to all feature maps of the stage, used as skips; the last one is its output."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = self.attend(i, self.run(resnet, x, emb))
            skips.append(x)
        for downsampler in self.downsamplers:
            skips.append(downsampler(x, emb))
        return tuple(skips)


class MidStage(Stage):
    """The middle stage at the lowest resolution: residual block, attention, residual block.

    Args:
        channels: Channels of the input and the output.
        head_dim: Channels per attention head; None for no attention.
        attn_groups: Number of groups of the attention's normalization; None for no normalization.
        **resnet: `time_dim`, `groups`, `eps`, `dropout`, `scale_shift` and `scale` of `ResnetBlock`.
    """

    def __init__(self, channels: int, *, head_dim: int | None, attn_groups: int | None, **resnet: Any):
        super().__init__([channels], channels, head_dim=head_dim, attn_groups=attn_groups, **resnet)
        self.resnets.append(ResnetBlock(channels, channels, **resnet))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to the same shape."""
        x = self.attend(0, self.run(self.resnets[0], x, emb))
        return self.run(self.resnets[1], x, emb)


class UpStage(Stage):
    """One resolution of the up path: residual blocks with one skip each, optionally with attention, then upsampling.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        skip_channels: Channels of the skips in the order of their use, one per residual block.
        head_dim: Channels per attention head; None for no attention.
        upsample: `conv`, `resnet`, or None at the highest resolution.
        **resnet: `time_dim`, `groups`, `eps`, `dropout` and `scale_shift` of `ResnetBlock`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        skip_channels: list[int],
        head_dim: int | None,
        upsample: str | None,
        **resnet: Any,
    ):
        first, *others = skip_channels
        channels = [in_channels + first, *(out_channels + skip for skip in others)]
        super().__init__(channels, out_channels, head_dim=head_dim, attn_groups=resnet["groups"], **resnet)
        self.upsamplers = nn.ModuleList()
        if upsample == "conv":
            self.upsamplers.append(Upsample(out_channels))
        elif upsample == "resnet":
            repeat = nn.Upsample(scale_factor=2.0, mode="nearest")
            self.upsamplers.append(ResnetBlock(out_channels, out_channels, resample=repeat, **resnet))

    def forward(self, x: Tensor, skips: tuple[Tensor, ...], emb: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to the output of the stage; use one skip per residual block, the last skip first."""
        # Take a tuple and return a tensor: hooks of offloading and sharding pass copies of containers, so popping
        # skips from the caller's list would have no effect.
        for i, (resnet, skip) in enumerate(zip(self.resnets, reversed(skips), strict=True)):
            x = torch.cat([x, skip], dim=1)
            x = self.attend(i, self.run(resnet, x, emb))
        for upsampler in self.upsamplers:
            x = upsampler(x, emb)
        return x
