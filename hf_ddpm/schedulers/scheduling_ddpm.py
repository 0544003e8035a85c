"""DDPM scheduler: adapts `hf_ddpm.diffusion` to the scheduler interface of diffusers."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from hf_ddpm.diffusion.gaussian import NOISE_SIGNAL, PREDICTION_TYPES, VARIANCE_TYPES, GaussianDiffusion, is_noise
from hf_ddpm.diffusion.outputs import dynamic_threshold, output_channels, split_output
from hf_ddpm.diffusion.schedules import (
    BETA_SCHEDULES,
    check_one_of,
    rescale_zero_terminal_snr,
    trailing_timesteps,
)
from hf_ddpm.diffusion.schedules import beta_schedule as named_beta_schedule
from hf_ddpm.utils.schema import CheckedConfig, check_range

# Options that the network was trained with: `from_config` of another class must not replace them by its defaults.
PROCESS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
STOCK_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")


class DDPMScheduler(CheckedConfig, SchedulerMixin, ConfigMixin):
    r"""DDPM sampling (Ho et al. 2020, Algorithm 2), in all timesteps or in fewer.

    The options and defaults are those of `diffusers.DDPMScheduler`: each class can read the other's configuration, and
    `from_config` converts to and from other diffusers schedulers. Differences from `diffusers.DDPMScheduler`:

    - Coefficients are computed in float64 and applied in float32, for images of any dtype.
    - The last step never adds noise. In diffusers, `trailing` spacing with `fixed_large` leaves the noise of the last
      step, $t = T/S - 1$, in the images.
    - Sampling starts from noise. If the first timestep of `leading` or `linspace` is so small that $x_t$ still shows
      the image, `trailing` timesteps are used instead; with 501 of 1000 steps, for example, `leading` starts at 500.
    - With `prediction_type="mean"` the network predicts the mean of the step, see `GaussianDiffusion.p_mean`.
    - Unknown values of options raise a `ValueError`.

    Args:
        num_train_timesteps: Number $T$ of diffusion steps.
        beta_start: First variance of a named schedule.
        beta_end: Last variance of a named schedule.
        beta_schedule: Name of the schedule, see `hf_ddpm.diffusion.schedules.beta_schedule`.
        trained_betas: The variances themselves, shape `(T,)`, instead of a named schedule.
        variance_type: See `GaussianDiffusion.log_var`. The names of diffusers that end in `_log` mean the same as
            those without it.
        clip_sample: Clip the estimate of $x_0$ in each step.
        prediction_type: Quantity that the network predicts: `epsilon`, `sample`, `mean` or `v_prediction`.
        thresholding: Use dynamic thresholding instead of clipping.
        dynamic_thresholding_ratio: Quantile of dynamic thresholding.
        clip_sample_range: Largest absolute value after clipping.
        sample_max_value: Largest threshold of dynamic thresholding.
        timestep_spacing: Spacing of the timesteps if there are fewer than $T$: `leading`, `linspace` or `trailing`
            (recommended).
        steps_offset: Added to the timesteps of `leading` spacing.
        rescale_betas_zero_snr: Rescale the variances so that $x_T$ contains no signal. With
            `prediction_type="epsilon"` this requires `clip_sample` or `thresholding`.

    Raises:
        ValueError: If an option has an unknown value or is out of range.

    Examples:
        >>> scheduler = DDPMScheduler(timestep_spacing="trailing")
        >>> scheduler.set_timesteps(4)
        >>> scheduler.timesteps
        tensor([999, 749, 499, 249])
        >>> x_t, noise = torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)
        >>> scheduler.step(noise, 249, x_t).pred_original_sample.abs().max()
        tensor(0.)
    """

    _compatibles = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ):
        self.variance_type = variance_type.removesuffix("_log")
        self.check_values(self.config)
        if trained_betas is not None:
            betas = torch.as_tensor(trained_betas, dtype=torch.float64)
            self.register_to_config(trained_betas=betas.tolist())
        else:
            betas = named_beta_schedule(beta_schedule, num_train_timesteps, beta_start, beta_end)
        if beta_schedule not in STOCK_SCHEDULES:
            # diffusers does not support these names, but reads the variances.
            self.register_to_config(beta_schedule="linear", trained_betas=betas.tolist())
        # from_config of another class drops values recorded as defaults, but its own defaults may differ: Heun's betas.
        defaults = [name for name in self.config.get("_use_default_values", []) if name not in PROCESS]
        self.register_to_config(_use_default_values=defaults)
        if rescale_betas_zero_snr:
            betas = rescale_zero_terminal_snr(betas)

        self.diffusion = GaussianDiffusion(betas)
        # Public attributes of diffusers' schedulers, used by its training scripts.
        self.betas = betas.float()
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = self.diffusion.alphas_cumprod.float()
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.custom_timesteps = False
        self.timestep_spacing = timestep_spacing  # of the current timesteps
        self.start_signal = NOISE_SIGNAL  # pipelines lower it for large images
        self._set_chain(list(reversed(range(num_train_timesteps))), device=None)

    @classmethod
    def check_values(cls, config: Mapping[str, Any]) -> None:
        """Check the options of a scheduler.

        Args:
            config: Values of all options of the constructor.

        Raises:
            ValueError: If an option has an unknown value or is out of range; the message names option and value.
        """
        check_one_of("variance_type", config["variance_type"].removesuffix("_log"), VARIANCE_TYPES)
        check_one_of("prediction_type", config["prediction_type"], PREDICTION_TYPES)
        check_one_of("timestep_spacing", config["timestep_spacing"], TIMESTEP_SPACINGS)
        check_one_of("beta_schedule", config["beta_schedule"], BETA_SCHEDULES)
        check_range(config, 1, 2**20, "num_train_timesteps")
        check_range(config, 0, 2**20, "steps_offset")
        check_range(config, 1e-30, 1, "beta_start", "beta_end", "dynamic_thresholding_ratio")
        check_range(config, 1e-30, 1e30, "clip_sample_range", "sample_max_value")
        betas = config["trained_betas"]
        if betas is not None:
            check_range({"trained_betas": torch.as_tensor(betas).tolist()}, 1e-30, 1, "trained_betas")
            if len(betas) != config["num_train_timesteps"]:
                raise ValueError(
                    f"trained_betas of {len(betas)} entries: expected num_train_timesteps="
                    f"{config['num_train_timesteps']} entries"
                )

    def __len__(self) -> int:
        """Return the number of diffusion steps that the network was trained for."""
        return self.config.num_train_timesteps

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Set the timesteps of the reverse process. Pass either `num_inference_steps` or `timesteps`.

        Args:
            num_inference_steps: Number of steps, in [1, T].
            device: Device of `self.timesteps`. The default, the CPU, avoids a GPU synchronization in every step.
            timesteps: The timesteps themselves, in descending order.

        Raises:
            ValueError: If both or none of the two are given, or the given one is invalid.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("set_timesteps: expected either num_inference_steps or timesteps")
        if timesteps is None:
            if not 1 <= num_inference_steps <= len(self) or num_inference_steps != int(num_inference_steps):
                raise ValueError(f"num_inference_steps={num_inference_steps}: expected 1 to {len(self)}")
            steps = self._spaced(int(num_inference_steps))
        else:
            steps = [int(t) for t in timesteps]
            if not steps or any(after >= before for before, after in zip(steps[:-1], steps[1:], strict=True)):
                raise ValueError(f"timesteps={steps}: expected at least one timestep, in descending order")
        self._set_chain(steps, device)
        self.num_inference_steps = num_inference_steps
        self.custom_timesteps = timesteps is not None

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """Return `sample` unchanged; part of the scheduler interface of diffusers.

        Args:
            sample: $x_t$.
            timestep: Not used.

        Returns:
            `sample`.
        """
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        r"""Take one step of the reverse process.

        $$
        x_{t-1} = \mu_\theta(x_t, t) + \sigma_t z, \quad z \sim \mathcal{N}(0, I) \tag{Alg. 2}
        $$

        Here $\mu_\theta$ is the posterior mean (Eq. 7) at the clipped $\hat x_0$. The last step adds no noise.

        Args:
            model_output: Output of the network at `timestep`, shape `(B, C, H, W)`, or `(B, 2C, H, W)` with a learned
                variance.
            timestep: One of `self.timesteps`.
            sample: $x_t$, shape `(B, C, H, W)`.
            generator: Random generator for $z$, or a list with one per image.
            return_dict: Return a `DDPMSchedulerOutput` instead of a tuple.

        Returns:
            $x_{t-1}$ as `.prev_sample` and $\hat x_0$ as `.pred_original_sample`, or a tuple of both, in the dtype of
                `sample`.

        Raises:
            ValueError: If `timestep` is not one of `self.timesteps`, or the shapes do not match.
        """
        t, x_t, prediction, variance_output = self._read(model_output, timestep, sample)
        mean, x_start = self._estimate(prediction, x_t, t)
        std: float | Tensor = 0.0
        if t > 0:
            std = _deviation(self._chain.log_var(t, x_t, self.variance_type, variance_output))
        return self._result(mean, std, x_start, model_output.dtype, sample, generator, return_dict)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Diffuse images to the given timesteps (Eq. 4), computed in float32 or float64.

        Args:
            original_samples: Images in [-1, 1], shape `(B, C, H, W)`.
            noise: Standard normal noise, same shape.
            timesteps: Timesteps in [0, T), int64, shape `(B,)` or `(1,)`.

        Returns:
            The noisy images, same shape and dtype as `original_samples`.
        """
        t = timesteps.to(original_samples.device)
        return self.diffusion.q_sample(original_samples, t, noise).to(original_samples.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the training target of a network with `prediction_type="v_prediction"` (Salimans & Ho 2022).

        Args:
            sample: Images in [-1, 1], shape `(B, C, H, W)`.
            noise: Standard normal noise, same shape.
            timesteps: Timesteps in [0, T), int64, shape `(B,)` or `(1,)`.

        Returns:
            The target `v`, same shape and dtype as `sample`.
        """
        t = timesteps.to(sample.device)
        return self.diffusion.target(sample, t, noise, "v_prediction").to(sample.dtype)

    def previous_timestep(self, timestep: int | Tensor) -> int | Tensor:
        """Return the timestep that `step` leads to.

        Args:
            timestep: One of `self.timesteps`, or a tensor of several.

        Returns:
            The next timestep, or -1 after the last one. As in diffusers, it is a tensor after `set_timesteps` was
                called, and before that of the same type as `timestep`.

        Raises:
            ValueError: If `timestep` is not one of `self.timesteps`.
        """
        indices = [self._index(t) for t in torch.as_tensor(timestep).reshape(-1)]
        if not (self.custom_timesteps or self.num_inference_steps):
            return timestep - 1
        steps = [int(self._chain.timesteps[index - 1]) if index > 0 else -1 for index in indices]
        return torch.tensor(steps if len(steps) > 1 else steps[0], device=self.timesteps.device)

    def _read(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor
    ) -> tuple[int, Tensor, Tensor, Tensor | None]:
        """Return the index of `timestep`, $x_t$, the prediction, and the network's output for the variance."""
        channels = output_channels(sample.shape[1], self.variance_type)
        if model_output.shape != (sample.shape[0], channels, *sample.shape[2:]):
            raise ValueError(
                f"model_output of shape {tuple(model_output.shape)}: does not match sample of shape "
                f"{tuple(sample.shape)} with variance_type={self.variance_type!r}; expected {channels} channels"
            )
        prediction, variance_output = split_output(_at_least_float32(model_output), sample.shape[1])
        return self._index(timestep), _at_least_float32(sample), prediction, variance_output

    def _estimate(self, prediction: Tensor, x_t: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """Return the mean of the reverse step and the clipped estimate of the image."""
        prediction_type = self.config.prediction_type

        def bound(x_start: Tensor) -> Tensor:
            if prediction_type == "epsilon" and self._chain.alphas_cumprod[t] == 0:
                x_start = self._without_signal(x_start, self._chain.timesteps[t])
            return self.bound(x_start)

        return self._chain.p_mean(prediction, x_t, t, prediction_type, bound)

    def _result(
        self,
        mean: Tensor,
        std: float | Tensor,
        x_start: Tensor,
        noise_dtype: torch.dtype,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
        return_dict: bool,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """Return the next sample; draw no noise if `std` is the number 0."""
        if isinstance(std, Tensor) or std > 0:
            mean = mean + std * randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=noise_dtype)
        x_prev, x_start = mean.to(sample.dtype), x_start.to(sample.dtype)
        if not return_dict:
            return x_prev, x_start
        return DDPMSchedulerOutput(prev_sample=x_prev, pred_original_sample=x_start)

    def _index(self, timestep: int | Tensor) -> int:
        """Return the index of a timestep in the respaced process; 0 is the last step taken."""
        index = self._index_of.get(float(timestep))
        if index is None:
            raise ValueError(
                f"timestep={float(timestep):g}: expected one of the {len(self.timesteps)} timesteps chosen by "
                "set_timesteps"
            )
        return index

    def _spaced(self, count: int) -> list[int]:
        """Return descending timesteps as in Lin et al. 2023, Table 2; `trailing` if others do not start from noise."""
        total, self.timestep_spacing = len(self), self.config.timestep_spacing
        if self.timestep_spacing == "leading":
            steps = np.arange(count)[::-1] * (total // count) + self.config.steps_offset
        else:
            steps = np.linspace(0, total - 1, count).round()[::-1]
        from_noise = steps[0] < total and is_noise(self.diffusion.alphas_cumprod, int(steps[0]), self.start_signal)
        if self.timestep_spacing == "trailing" or not from_noise:
            self.timestep_spacing = "trailing"
            return trailing_timesteps(total, count)
        return [int(t) for t in steps]

    def _set_chain(self, descending: list[int], device: str | torch.device | None) -> None:
        self._chain = self.diffusion.respaced(descending)
        self._index_of = {int(t): index for index, t in enumerate(self._chain.timesteps)}
        self.timesteps = torch.tensor(descending, device=device)

    def _without_signal(self, x_start: Tensor, timestep: Tensor) -> Tensor:
        """Replace undefined estimates by 0 where the signal is 0; infinite ones stay infinite, as in diffusers."""
        if not (self.config.thresholding or self.config.clip_sample):
            raise ValueError(
                f"timestep={int(timestep)}: x_t contains no signal with rescale_betas_zero_snr=True, so "
                "prediction_type='epsilon' cannot give an estimate of the image; set clip_sample=True, or start at a "
                "smaller timestep with set_timesteps(timesteps=...)"
            )
        return x_start.nan_to_num(0.0, torch.inf, -torch.inf)

    def bound(self, x_start: Tensor) -> Tensor:
        r"""Clip estimates of images as configured, by `thresholding` or `clip_sample`.

        Args:
            x_start: Estimates $\hat x_0$, shape `(B, C, H, W)`.

        Returns:
            The clipped estimates, same shape.
        """
        config = self.config
        if config.thresholding:
            return dynamic_threshold(x_start, config.dynamic_thresholding_ratio, config.sample_max_value)
        if config.clip_sample:
            return x_start.clamp(-config.clip_sample_range, config.clip_sample_range)
        return x_start


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _deviation(log_var: float | Tensor) -> float | Tensor:
    return torch.exp(0.5 * log_var) if isinstance(log_var, Tensor) else math.exp(0.5 * log_var)
