"""Building blocks of the U-Net: timestep embedding, residual block, attention, resampling; initial weights.

Attribute names equal the keys of diffusers checkpoints. Modules are constructed and registered in the same order as in
diffusers, so that the same seed gives the same weights and `parameters()` returns them in the same order.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_ddpm.models.dropout import Dropout


def sinusoidal(t: Tensor, dim: int, *, flip_sin_to_cos: bool, freq_shift: float) -> Tensor:
    r"""Return the Transformer sinusoidal position embedding (Vaswani et al. 2017) of timesteps.

    $$
    (\sin(\omega_0 t), \dots, \cos(\omega_0 t), \dots), \quad
    \omega_k = 10000^{-k / (d/2 - s)}
    $$

    Args:
        t: Timesteps, shape `(B,)`.
        dim: Size $d$ of the embedding; if it is odd, the last entry is zero.
        flip_sin_to_cos: Put the cosines first. In the paper's code they are last.
        freq_shift: The shift $s$; 1 in the paper's code.

    Returns:
        The embedding, float32, shape `(B, dim)`.
    """
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t[:, None].float() * torch.exp(-math.log(10000) * steps / (half - freq_shift))
    waves = [angles.cos(), angles.sin()] if flip_sin_to_cos else [angles.sin(), angles.cos()]
    return F.pad(torch.cat(waves, dim=1), (0, dim % 2))


class TimestepEmbedding(nn.Module):
    """Two-layer network applied to the sinusoidal embedding."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, in_dim)` to `(B, dim)`."""
        return self.linear_2(F.silu(self.linear_1(x)))


# Devices whose group normalization supports inputs in half precision with float32 weights, also under autocast.
MIXED_NORMS = ("cpu",)


class GroupNorm(nn.GroupNorm):
    """Group normalization in the precision of its input, also under autocast on CUDA, which would use float32."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `(B, C, ...)`."""
        if x.dtype == self.weight.dtype or x.device.type in MIXED_NORMS:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class ResnetBlock(nn.Module):
    r"""Residual block (Appendix B of the paper); the timestep embedding is added between its two convolutions.

    $$
    h = \text{conv}_1(\text{silu}(\text{norm}_1(x))) + W \, \text{silu}(e_t), \quad
    y = \text{shortcut}(x) + \text{conv}_2(\text{dropout}(\text{silu}(\text{norm}_2(h))))
    $$

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        time_dim: Channels of the activated timestep embedding $\text{silu}(e_t)$.
        groups: Number of groups of the normalizations.
        eps: Epsilon of the normalizations.
        dropout: Dropout probability in [0, 1).
        scale_shift: Let the embedding scale and shift the normalized features instead of adding it
            (Nichol & Dhariwal 2021).
        resample: Module that resamples both branches before the first convolution; None for no resampling.
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
        """Map `(B, C, H, W)` and the activated timestep embedding `(B, time_dim)` to `(B, C', H', W')`."""
        h = activate(self.norm1(x))
        if self.resample is not None:
            x, h = self.resample(x), self.resample(h)
        h = self.conv1(h)

        emb = self.time_emb_proj(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h.add_(emb))  # in place: backward does not need the output of a convolution

        h = self.conv2(self.dropout(activate(h)))
        h += x if self.conv_shortcut is None else self.conv_shortcut(x)
        return _divide(h, self.scale)


class Attention(nn.Module):
    r"""Self-attention over the $HW$ positions of a feature map, with a residual connection.

    Args:
        channels: Channels of the input and the output.
        head_dim: Channels per attention head.
        groups: Number of groups of the normalization; None for no normalization.
        eps: Epsilon of the normalization.
        scale: Divisor of the output.
    """

    # The diffusers loader renames the keys of old checkpoints (query, key, value, proj_attn) in modules with this flag.
    _from_deprecated_attn_block = True

    def __init__(self, channels: int, *, head_dim: int, groups: int | None, eps: float, scale: float = 1.0):
        super().__init__()
        if channels < head_dim:
            raise ValueError(f"attention_head_dim={head_dim}: expected at most {channels}, the channels of that block")
        self.heads = channels // head_dim
        inner = self.heads * head_dim
        self.group_norm = GroupNorm(groups, channels, eps=eps) if groups is not None else nn.Identity()
        self.to_q = nn.Linear(channels, inner)
        self.to_k = nn.Linear(channels, inner)
        self.to_v = nn.Linear(channels, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, channels)])
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to the same shape."""
        h = self.group_norm(x).flatten(2).transpose(1, 2)
        q, k, v = (
            project(h).unflatten(2, (self.heads, -1)).transpose(1, 2) for project in (self.to_q, self.to_k, self.to_v)
        )
        h = attend(q, k, v).transpose(1, 2).flatten(2)
        h = self.to_out[0](h).transpose(1, 2).reshape(x.shape)
        return _divide(h + x, self.scale)


# On CPUs in bf16, plain matrix products are faster than torch's fused kernel if q has more entries than FEWEST_ENTRIES.
# They store all attention scores (positions squared), so they are used for at most MOST_POSITIONS positions.
FEWEST_ENTRIES, MOST_POSITIONS = 2**13, 2**10


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    r"""Return $\text{softmax}(q k^T / \sqrt{d}) v$, shape `(B, heads, positions, d)`."""
    is_bf16 = q.dtype == torch.bfloat16  # not float16: scores may exceed its range
    if q.device.type == "cpu" and is_bf16 and q.numel() > FEWEST_ENTRIES and q.shape[-2] <= MOST_POSITIONS:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return scores.softmax(dim=-1).to(v.dtype) @ v  # autocast leaves the softmax in float32
    return F.scaled_dot_product_attention(q, k, v)


class Downsample(nn.Module):
    """Halves height and width by a convolution with stride 2; padding 0 pads right and bottom only, as TensorFlow."""

    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to `(B, C, H/2, W/2)`; ignore the timestep embedding."""
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.conv.padding == (0, 0) else x)


class Upsample(nn.Module):
    """Doubles height and width by nearest-neighbor upsampling, followed by a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to `(B, C, 2H, 2W)`; ignore the timestep embedding."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def activate(x: Tensor) -> Tensor:
    """Apply SiLU, in place when gradients are disabled."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def _divide(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1 else x / scale


# Last layers of residual branches: zero weights make each block start as the identity.
ZERO = ("conv2", "to_out.0", "conv_out")


def initialize_like_paper(unet: nn.Module) -> None:
    r"""Initialize the weights of a U-Net in place as in the code of Ho et al. 2020.

    Convolutions and linear layers get uniform weights with variance $2 / (n_\text{in} + n_\text{out})$ and zero
    biases. The last layer of each residual block, of each attention and of the network gets zero weights. (The
    constructor of `UNet2DModel` initializes as diffusers does.)

    Args:
        unet: The network, on any device.
    """
    for name, module in unet.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.zeros_(module.bias)
            if name.endswith(ZERO):
                nn.init.zeros_(module.weight)
            else:
                # Draw in contiguous order, so that the weights do not depend on their memory layout.
                module.weight.data.copy_(nn.init.xavier_uniform_(module.weight.new_empty(module.weight.shape)))
