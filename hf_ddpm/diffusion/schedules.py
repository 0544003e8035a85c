r"""Variance schedules $\beta_0, \dots, \beta_{T-1}$ of the forward process, in float64.

Timesteps are 0-based everywhere in this package: index `t` is the paper's $t + 1$.
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
    r"""Return the variances $\beta_t$ of a named schedule.

    - `linear`: $\beta_t$ from `beta_start` to `beta_end` in equal steps (Ho et al. 2020, Section 4).
    - `scaled_linear`, called `quad` in the paper's code: $\sqrt{\beta_t}$ in equal steps.
    - `const`: `beta_end` at every timestep.
    - `squaredcos_cap_v2`: the cosine schedule (Nichol & Dhariwal 2021, Eq. 17), at most 0.999. It ignores `beta_start`
      and `beta_end`.
    - `sigmoid`: a logistic curve from `beta_start` to `beta_end` (Xu et al. 2022).

    Args:
        name: One of `BETA_SCHEDULES`.
        num_timesteps: Number $T$ of diffusion steps, at least 1.
        beta_start: First variance, in (0, 1).
        beta_end: Last variance, in (0, 1).

    Returns:
        The variances, float64, shape `(num_timesteps,)`.

    Raises:
        ValueError: If `name` is unknown, or `num_timesteps` is less than 1.

    Examples:
        >>> beta_schedule("linear", 3, 0.1, 0.3)
        tensor([0.1000, 0.2000, 0.3000], dtype=torch.float64)
    """
    check_one_of("beta_schedule", name, BETA_SCHEDULES)
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps={num_timesteps}: expected at least 1")
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
    r"""Shift and scale $\sqrt{\bar\alpha_t}$ so that $x_T$ contains no signal (Lin et al. 2023, Algorithm 1).

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
    r"""Return $\bar\alpha_{t-1}$, which is 1 at `t = 0`."""
    return torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])


def trailing_timesteps(total: int, count: int) -> list[int]:
    r"""Return evenly spaced timesteps, descending from the last one ("trailing" in Lin et al. 2023, Table 2).

    $$
    \tau_i = \operatorname{round}(T - i \, T / S) - 1, \quad i = 0, \dots, S - 1
    $$

    If `count` is a divisor of `total`, or a divisor times a power of two, then every second one of `2 * count`
    timesteps is among the `count` timesteps.

    Args:
        total: Number $T$ of diffusion steps.
        count: Number $S$ of timesteps to return, in [1, T].

    Returns:
        The timesteps, in [0, T).

    Examples:
        >>> trailing_timesteps(1000, 4)
        [999, 749, 499, 249]
    """
    # Cut to `count`: rounding errors make the range one entry too long for counts such as 61.
    steps = np.round(np.arange(total, 0, -total / count))[:count] - 1
    return [int(t) for t in steps]


def check_one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise a `ValueError` with name, value and allowed values, unless the value is allowed."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(allowed)}")
