"""The embedding of time."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoidal(t: Tensor, dim: int, *, flip_sin_to_cos: bool, freq_shift: float) -> Tensor:
    r"""Returns the Transformer sinusoidal position embedding (Vaswani et al. 2017) of the time.

    .. math:: (\sin(\omega_0 t), \dots, \cos(\omega_0 t), \dots), \quad
        \omega_k = 10000^{-k / (d/2 - s)}

    Args:
        t: Times, shape `(B,)`.
        dim: Size :math:`d` of the embedding; an odd one is padded with a zero.
        flip_sin_to_cos: Whether the cosines come first. The paper's code has them last.
        freq_shift: The :math:`s` above: 1 in the paper's code.

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
