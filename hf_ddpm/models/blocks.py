"""The parts of the U-Net: embedding of time, residual block, attention, resampling; their initial weights.

The attribute names are the keys of the checkpoints of diffusers, and the order of construction and of registration
is that of its U-Net: the same seed gives the same weights, and `parameters()` the same list.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_ddpm.models.dropout import Dropout


def sinusoidal(t: Tensor, dim: int, *, flip_sin_to_cos: bool, freq_shift: float) -> Tensor:
    r"""Returns the Transformer sinusoidal position embedding (Vaswani et al. 2017) of the time.

    $$
    (\sin(\omega_0 t), \dots, \cos(\omega_0 t), \dots), \quad
    \omega_k = 10000^{-k / (d/2 - s)}
    $$

    Args:
        t: Times, shape `(B,)`.
        dim: Size $d$ of the embedding; an odd one is padded with a zero.
        flip_sin_to_cos: Whether the cosines come first. The paper's code has them last.
        freq_shift: The $s$ above: 1 in the paper's code.

    Returns:
        The embedding, float32, shape `(B, dim)`.
    """
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t[:, None].float() * torch.exp(-math.log(10000) * steps / (half - freq_shift))
    waves = [angles.cos(), angles.sin()] if flip_sin_to_cos else [angles.sin(), angles.cos()]
    return F.pad(torch.cat(waves, dim=1), (0, dim % 2))


class TimestepEmbedding(nn.Module):
    """The two-layer network behind the sinusoids: `(B, in_dim)` to `(B, dim)`."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(B, in_dim)` to `(B, dim)`."""
        return self.linear_2(F.silu(self.linear_1(x)))


# Devices whose normalizations take float32 weights with inputs in half precision, and whose autocast leaves it at that.
MIXED_NORMS = ("cpu",)


class GroupNorm(nn.GroupNorm):
    """Group normalization in the precision of its input, under autocast too, which would run it in float32 on CUDA."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `(B, C, ...)`."""
        if x.dtype == self.weight.dtype or x.device.type in MIXED_NORMS:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class ResnetBlock(nn.Module):
    r"""The residual block of the paper's Appendix B, with the time embedding added between its two convolutions.

    $$
    h = \text{conv}_1(\text{silu}(\text{norm}_1(x))) + W \, \text{silu}(e_t), \quad
    y = \text{shortcut}(x) + \text{conv}_2(\text{dropout}(\text{silu}(\text{norm}_2(h))))
    $$

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        time_dim: Channels of the activated time embedding $\text{silu}(e_t)$.
        groups: Groups of the normalizations.
        eps: Their epsilon.
        dropout: Probability in [0, 1).
        scale_shift: Whether the embedding scales and shifts the normalized features, instead of being added
            (Nichol & Dhariwal 2021).
        resample: What happens to both branches before the first convolution, if anything.
        scale: Divisor of the output.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        time_dim: int,
        groups: int,
        eps: float,
        dropout: float,
        scale_shift: bool = False,
        resample: nn.Module | None = None,
        scale: float = 1.0,
    ):
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, 2 * out_channels if scale_shift else out_channels)
        self.norm2 = GroupNorm(groups, out_channels, eps=eps)
        self.dropout = Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.resample = resample
        self.scale_shift = scale_shift
        self.scale = scale

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Maps `(B, C, H, W)` and the activated time embedding `(B, time_dim)` to `(B, C', H', W')`."""
        h = activate(self.norm1(x))
        if self.resample is not None:
            x, h = self.resample(x), self.resample(h)
        h = self.conv1(h)

        emb = self.time_emb_proj(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h.add_(emb))  # no gradient needs the output of a convolution

        h = self.conv2(self.dropout(activate(h)))
        h += x if self.conv_shortcut is None else self.conv_shortcut(x)
        return _divide(h, self.scale)


class Attention(nn.Module):
    r"""Self-attention over the $HW$ positions of a feature map, around a residual.

    Args:
        channels: Channels of the input and the output.
        head_dim: Channels of one head.
        groups: Groups of the normalization; none if None.
        eps: Its epsilon.
        scale: Divisor of the output.
    """

    # Old checkpoints say query, key, value and proj_attn; the diffusers loader renames them where this stands.
    _from_deprecated_attn_block = True

    def __init__(self, channels: int, *, head_dim: int, groups: int | None, eps: float, scale: float = 1.0):
        super().__init__()
        if channels < head_dim:
            raise ValueError(f"attention_head_dim={head_dim} is not allowed: at most the {channels} channels there")
        self.heads = channels // head_dim
        inner = self.heads * head_dim
        self.group_norm = GroupNorm(groups, channels, eps=eps) if groups is not None else nn.Identity()
        self.to_q = nn.Linear(channels, inner)
        self.to_k = nn.Linear(channels, inner)
        self.to_v = nn.Linear(channels, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, channels)])
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(B, C, H, W)` to the same shape."""
        h = self.group_norm(x).flatten(2).transpose(1, 2)
        q, k, v = (
            project(h).unflatten(2, (self.heads, -1)).transpose(1, 2) for project in (self.to_q, self.to_k, self.to_v)
        )
        h = attend(q, k, v).transpose(1, 2).flatten(2)
        h = self.to_out[0](h).transpose(1, 2).reshape(x.shape)
        return _divide(h + x, self.scale)


# On a CPU in bf16, plain products are faster than torch's fused kernel with more entries of the queries than
# this, and up to this many positions, whose square is the size of the scores.
FEWEST_ENTRIES, MOST_POSITIONS = 2**13, 2**10


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    r"""Return $\text{softmax}(q k^T / \sqrt{d}) v$, shape `(B, heads, positions, d)`."""
    is_bf16 = q.dtype == torch.bfloat16  # scores may exceed the range of float16
    if q.device.type == "cpu" and is_bf16 and q.numel() > FEWEST_ENTRIES and q.shape[-2] <= MOST_POSITIONS:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return scores.softmax(dim=-1).to(v.dtype) @ v  # autocast leaves the softmax in float32
    return F.scaled_dot_product_attention(q, k, v)


class Downsample(nn.Module):
    """Halves a feature map by a convolution of stride 2; padding 0 pads below and to the right, as TensorFlow does."""

    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Maps `(B, C, H, W)` to `(B, C, H/2, W/2)`, whatever the time."""
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.conv.padding == (0, 0) else x)


class Upsample(nn.Module):
    """Doubles a feature map by repetition and a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Maps `(B, C, H, W)` to `(B, C, 2H, 2W)`, whatever the time."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def activate(x: Tensor) -> Tensor:
    """Returns SiLU; in the place of its input, a normalization's output, where no gradient will ask for that."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def _divide(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1 else x / scale


# The layers that end a residual branch: starting at zero, each block starts as the identity.
ZERO = ("conv2", "to_out.0", "conv_out")


def initialize_like_paper(unet: nn.Module) -> None:
    r"""Initializes a U-Net in place, as Ho et al. do.

    Convolutions and linear layers get uniform weights of variance $2 / (n_\text{in} + n_\text{out})$ and zero
    biases; the last layer of each residual block, of each attention and of the network gets zero weights. The
    constructor itself starts as diffusers does, whose checkpoints need no other.

    Args:
        unet: The network, on any device.
    """
    for name, module in unet.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.zeros_(module.bias)
            if name.endswith(ZERO):
                nn.init.zeros_(module.weight)
            else:
                # Drawn in the order of the shape: the same weights, however they lie in memory.
                module.weight.data.copy_(nn.init.xavier_uniform_(module.weight.new_empty(module.weight.shape)))
