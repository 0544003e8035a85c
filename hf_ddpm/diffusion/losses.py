"""Training objectives: functions of what a network said about a batch, an image at a time."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_ddpm.diffusion.gaussian import LEARNED, GaussianDiffusion
from hf_ddpm.diffusion.likelihood import bound_nats
from hf_ddpm.diffusion.outputs import split_output
from hf_ddpm.diffusion.schedules import check_one_of

OBJECTIVES = ("simple", "vlb", "hybrid", "min_snr", "truncated_snr")

# Weight of the bound beside the simple objective (Nichol & Dhariwal 2021, Eq. 16): 0.001, for a bound in bits as in
# their code. Ours is in nats.
BOUND_WEIGHT = 0.001 / math.log(2)
# Cap of the signal-to-noise ratio (Hang et al. 2023).
SNR_CAP = 5.0


def truncated_snr(diffusion: GaussianDiffusion, t: Tensor, like: Tensor) -> Tensor:
    r"""Returns the weight of an error of the image (Salimans & Ho 2022, Section 4).

    .. math:: \max\Big( \frac{\bar\alpha_t}{1 - \bar\alpha_t}, 1 \Big), \quad \text{so that} \quad
        w_t \| x_0 - \hat x_0 \|^2 = \max\big( \| x_0 - \hat x_0 \|^2, \| \epsilon - \hat\epsilon \|^2 \big)

    Args:
        diffusion: The process.
        t: Steps in [0, T), int64, shape `(B,)`.
        like: A tensor of the dtype and device of the result, shape `(B, ...)`.

    Returns:
        The weights, shape `(B,)`.
    """
    return torch.as_tensor(diffusion.snr(t, like)).flatten().clamp(min=1)


@dataclass(frozen=True)
class Objective:
    r"""What a network is trained for.

    - `simple`: :math:`\| \epsilon - \epsilon_\theta \|^2` (Eq. 14), or the like for other predictions.
    - `vlb`: the variational bound itself (Eq. 5), an unbiased estimate from one step an image, in nats a dimension.
      For noise predictions and a fixed variance it is Eq. 12: the above with the weight
      :math:`\beta_t^2 / (2 \sigma_t^2 \alpha_t (1 - \bar\alpha_t))`, and a constant.
    - `hybrid`: `simple` for the mean and, with a small weight, `vlb` for the variance alone.
    - `min_snr`: `simple`, with the weight of a noise error limited to that of an image error of
      :math:`\text{SNR} \le 5` (Hang et al. 2023).
    - `truncated_snr`: the larger of the errors of image and noise, see `truncated_snr`.

    Args:
        name: One of `OBJECTIVES`.
        prediction_type: See `GaussianDiffusion.target`.
        variance_type: See `GaussianDiffusion.log_var`.
        levels: Number of pixel values that the data take.

    Raises:
        ValueError: If the objective is unknown, or leaves a learned variance without training.

    Example:
        >>> diffusion = GaussianDiffusion(torch.linspace(1e-4, 0.02, 1000))
        >>> x_start, noise, t = torch.zeros(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.tensor([10, 500])
        >>> x_t = diffusion.q_sample(x_start, t, noise)
        >>> Objective("simple")(diffusion, noise + 0.5, x_start, t, noise, x_t)  # of a network that is wrong by 1/2
        tensor([0.2500, 0.2500])
    """

    name: str
    prediction_type: str = "epsilon"
    variance_type: str = "fixed_large"
    levels: int = 256

    def __post_init__(self) -> None:
        """Checks the combination."""
        check_one_of("objective", self.name, OBJECTIVES)
        fixed = ("simple", "vlb", "min_snr", "truncated_snr")
        allowed = ("vlb", "hybrid") if self.variance_type in LEARNED else fixed
        if self.name not in allowed:
            raise ValueError(
                f"objective={self.name!r} is not allowed with variance_type={self.variance_type!r}: "
                f"one of {', '.join(allowed)}"
            )
        if self.name.endswith("snr") and self.prediction_type == "mean":
            raise ValueError(f"objective={self.name!r} is not allowed with prediction_type='mean'")

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
        """Evaluates the objective.

        Args:
            diffusion: The process.
            output: What the network said about `x_t`, shape `(B, C, H, W)`, or `(B, 2C, H, W)` with a learned variance.
            x_start: The images, shape `(B, C, H, W)`.
            t: Their steps, int64, shape `(B,)`.
            noise: What they were diffused with, shape of `x_start`.
            x_t: The diffused images, same shape.
            classes: Not used; `Distillation` has the same arguments.

        Returns:
            The loss of each image, float32, shape `(B,)`.
        """
        prediction, variance_output = split_output(output.float(), x_start.shape[1])
        if self.name == "vlb":
            return self._bound(diffusion, prediction, variance_output, x_start, t, x_t)
        target = diffusion.target(x_start, t, noise, self.prediction_type)
        simple = (prediction - target).square().flatten(1).mean(dim=1)
        if self.name.endswith("snr"):
            snr = torch.as_tensor(diffusion.snr(t, x_start)).flatten()
            # The weight of an error of the image, in terms of the errors that it means for the noise and for v.
            if self.name == "min_snr":
                weight, of_noise = snr.clamp(max=SNR_CAP), (SNR_CAP / snr).clamp(max=1)
            else:
                weight, of_noise = truncated_snr(diffusion, t, x_start), (1 / snr).clamp(min=1)
            weights = {"sample": weight, "epsilon": of_noise, "v_prediction": weight / (snr + 1)}
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
        """Estimates the bound, which is a sum over all steps, from the term of one."""
        mean, _ = diffusion.p_mean(prediction, x_t, t, self.prediction_type)
        log_var = diffusion.log_var(t, x_t, self.variance_type, variance_output)
        return len(diffusion) * bound_nats(diffusion, x_start, mean, x_t, t, log_var, self.levels)
