"""Training objectives: the loss per image, from a network's output for a batch."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_ddpm.diffusion.gaussian import LEARNED, GaussianDiffusion
from hf_ddpm.diffusion.likelihood import bound_nats
from hf_ddpm.diffusion.outputs import split_output
from hf_ddpm.diffusion.schedules import check_one_of

OBJECTIVES = ("simple", "vlb", "hybrid", "min_snr", "truncated_snr")

# Weight of the bound relative to the simple objective (Nichol & Dhariwal 2021, Eq. 16): 0.001 for a bound in bits, as
# in their code; here the bound is in nats.
BOUND_WEIGHT = 0.001 / math.log(2)
# Upper limit of the signal-to-noise ratio (Hang et al. 2023).
SNR_CAP = 5.0


@dataclass(frozen=True)
class Objective:
    r"""Training objective of a diffusion model.

    - `simple`: the mean squared error of the prediction; for noise, $\| \epsilon - \epsilon_\theta \|^2$ (Eq. 14).
    - `vlb`: an unbiased estimate of the variational bound (Eq. 5) from one timestep per image, in nats per dimension.
      For noise predictions and a fixed variance it is Eq. 12: the squared error weighted by
      $\beta_t^2 / (2 \sigma_t^2 \alpha_t (1 - \bar\alpha_t))$, plus a constant.
    - `hybrid`: `simple` for the mean plus, with a small weight, `vlb` for the variance only (Nichol & Dhariwal 2021,
      Eq. 16).
    - `min_snr`: the squared error of $\hat x_0$ weighted by $\min(\text{SNR}, 5)$ (Hang et al. 2023).
    - `truncated_snr`: the squared error of $\hat x_0$ weighted by $\max(\text{SNR}, 1)$, which is the larger of the
      squared errors of image and noise (Salimans & Ho 2022, Section 4).

    Args:
        name: One of `OBJECTIVES`.
        prediction_type: See `GaussianDiffusion.target`.
        variance_type: See `GaussianDiffusion.log_var`.
        levels: Number of distinct pixel values of the data.

    Raises:
        ValueError: If the objective is unknown, or does not support the prediction type or the variance type.

    Examples:
        >>> diffusion = GaussianDiffusion(torch.linspace(1e-4, 0.02, 1000))
        >>> x_start, noise, t = torch.zeros(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.tensor([10, 500])
        >>> x_t = diffusion.q_sample(x_start, t, noise)
        >>> Objective("simple")(diffusion, noise + 0.5, x_start, t, noise, x_t)  # a network with an error of 1/2
        tensor([0.2500, 0.2500])
    """

    name: str
    prediction_type: str = "epsilon"
    variance_type: str = "fixed_large"
    levels: int = 256

    def __post_init__(self) -> None:
        """Check that objective, prediction type and variance type fit together."""
        check_one_of("objective", self.name, OBJECTIVES)
        fixed = ("simple", "vlb", "min_snr", "truncated_snr")
        allowed = ("vlb", "hybrid") if self.variance_type in LEARNED else fixed
        if self.name not in allowed:
            raise ValueError(
                f"objective={self.name!r}: not supported with variance_type={self.variance_type!r}; "
                f"expected one of {', '.join(allowed)}"
            )
        if self.name.endswith("snr") and self.prediction_type == "mean":
            raise ValueError(
                f"objective={self.name!r}: not supported with prediction_type='mean'; expected simple or vlb"
            )

    def __call__(
        self,
        diffusion: GaussianDiffusion,
        output: Tensor,
        x_start: Tensor,
        t: Tensor,
        noise: Tensor,
        x_t: Tensor,
        classes: Tensor | None = None,
    ) -> Tensor:
        r"""Evaluate the objective.

        Args:
            diffusion: The diffusion process.
            output: Output of the network for `x_t`, shape `(B, C, H, W)`, or `(B, 2C, H, W)` with a learned variance.
            x_start: Images $x_0$ in [-1, 1], shape `(B, C, H, W)`.
            t: Timesteps in [0, T), int64, shape `(B,)`.
            noise: The noise $\epsilon$ in `x_t`, shape of `x_start`.
            x_t: The diffused images, shape of `x_start`.
            classes: Not used; present because `Distillation` has the same arguments.

        Returns:
            The loss per image, float32, shape `(B,)`.
        """
        prediction, variance_output = split_output(output.float(), x_start.shape[1])
        if self.name == "vlb":
            return self._bound(diffusion, prediction, variance_output, x_start, t, x_t)
        target = diffusion.target(x_start, t, noise, self.prediction_type)
        simple = (prediction - target).square().flatten(1).mean(dim=1)
        if self.name.endswith("snr"):
            snr = torch.as_tensor(diffusion.snr(t, x_start)).flatten()
            # Both weights are defined for the error of x_0, which is the error of the noise divided by the SNR, and
            # the error of v divided by SNR + 1.
            if self.name == "min_snr":
                weight, noise_weight = snr.clamp(max=SNR_CAP), (SNR_CAP / snr).clamp(max=1)
            else:
                weight, noise_weight = snr.clamp(min=1), (1 / snr).clamp(min=1)
            weights = {"sample": weight, "epsilon": noise_weight, "v_prediction": weight / (snr + 1)}
            return simple * weights[self.prediction_type]
        if self.name == "hybrid":
            bound = self._bound(diffusion, prediction.detach(), variance_output, x_start, t, x_t)
            return simple + BOUND_WEIGHT * bound
        return simple

    def _bound(
        self,
        diffusion: GaussianDiffusion,
        prediction: Tensor,
        variance_output: Tensor | None,
        x_start: Tensor,
        t: Tensor,
        x_t: Tensor,
    ) -> Tensor:
        """Estimate the bound, a sum over all timesteps, from the term of one timestep per image."""
        mean, _ = diffusion.p_mean(prediction, x_t, t, self.prediction_type)
        log_var = diffusion.log_var(t, x_t, self.variance_type, variance_output)
        return len(diffusion) * bound_nats(diffusion, x_start, mean, x_t, t, log_var, self.levels)
