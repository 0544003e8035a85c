r"""Variance schedules :math:`\beta_0, \dots, \beta_{T-1}` of the forward process, in float64.

Time is 0-based everywhere in this package: index `t` is the paper's :math:`t + 1`.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

BETA_SCHEDULES = ("linear", "scaled_linear", "quad", "const", "squaredcos_cap_v2", "sigmoid")


def beta_schedule(
    name: str = "linear", num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
) -> Tensor:
    r"""Returns the variances :math:`\beta_t` of a named schedule.

    - `linear`: from `beta_start` to `beta_end` in equal steps (Ho et al. 2020, Section 4).
    - `scaled_linear`, or `quad` in the paper's code: the same for :math:`\sqrt{\beta_t}`.
    - `const`: `beta_end` throughout.
    - `squaredcos_cap_v2`: the cosine schedule (Nichol & Dhariwal 2021, Eq. 17), capped at 0.999; it knows no range.
    - `sigmoid`: a logistic curve between the two ends (Xu et al. 2022).

    Args:
        name: One of `BETA_SCHEDULES`.
        num_timesteps: Number :math:`T` of diffusion steps, at least 1.
        beta_start: First variance, in (0, 1).
        beta_end: Last variance, in (0, 1).

    Returns:
        The variances, float64, shape `(num_timesteps,)`.

    Raises:
        ValueError: If `name` or `num_timesteps` is not allowed.

    Example:
        >>> beta_schedule("linear", 3, 0.1, 0.3)
        tensor([0.1000, 0.2000, 0.3000], dtype=torch.float64)
    """
    check_one_of("beta_schedule", name, BETA_SCHEDULES)
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps={num_timesteps} is not allowed: at least 1")
    if name == "linear":
        return torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)
    if name == "const":
        return torch.full((num_timesteps,), beta_end, dtype=torch.float64)
    if name in ("scaled_linear", "quad"):
        return torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64) ** 2
    if name == "squaredcos_cap_v2":
        u = torch.linspace(0, 1, num_timesteps + 1, dtype=torch.float64)
        alpha_bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    ramp = torch.sigmoid(torch.linspace(-6, 6, num_timesteps, dtype=torch.float64))
    return beta_start + (beta_end - beta_start) * ramp


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    r"""Shifts and scales :math:`\sqrt{\bar\alpha_t}` so that the last step holds no signal (Lin et al. 2023, Alg. 1).

    Args:
        betas: The variances, shape `(T,)`.

    Returns:
        The rescaled variances, same shape; the last one is 1.
    """
    signal = torch.cumprod(1 - betas, dim=0).sqrt()
    first, last = signal[0].clone(), signal[-1].clone()
    alphas_cumprod = ((signal - last) * first / (first - last)) ** 2
    return 1 - alphas_cumprod / shift_right(alphas_cumprod)


def shift_right(alphas_cumprod: Tensor) -> Tensor:
    r"""Returns :math:`\bar\alpha_{t-1}`, where nothing has been diffused before the first step: 1 at `t = 0`."""
    return torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])


def trailing_timesteps(total: int, count: int) -> list[int]:
    r"""Returns `count` of `total` timesteps, evenly spaced and descending from the last one (Lin et al. 2023, Table 2).

    .. math:: \tau_i = \operatorname{round}(T - i \, T / S) - 1, \quad i = 0, \dots, S - 1

    If `count` is a divisor of `total` times a power of two, every second of `2 * count` timesteps is one of `count`.

    Args:
        total: Number :math:`T` of diffusion steps.
        count: Number :math:`S` of steps, in [1, T].

    Returns:
        The timesteps in [0, T).

    Example:
        >>> trailing_timesteps(1000, 4)
        [999, 749, 499, 249]
    """
    # Cut to length: rounding makes the range one too long for counts such as 61.
    steps = np.round(np.arange(total, 0, -total / count))[:count] - 1
    return [int(t) for t in steps]


def check_one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raises a `ValueError` that names the option, its value and what is allowed, unless the value is."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not allowed: one of {', '.join(allowed)}")
