"""DDIM scheduler: the marginals of DDPM with less noise per step, or none."""

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from torch import Tensor

from hf_ddpm.schedulers.scheduling_ddpm import DDPMScheduler


class DDIMScheduler(DDPMScheduler):
    r"""DDIM sampling (Song et al. 2021): deterministic by default, as random as DDPM with `eta=1`.

    The options are those of `DDPMScheduler`. There are two differences from `diffusers.DDIMScheduler`:

    - Each step leads to the next timestep, for every spacing. In diffusers a step leads to
      $t - \lfloor T / S \rfloor$, which leaves noise in the images with `linspace`, and with `trailing` if `S` does
      not divide `T`.
    - The noise is computed from the clipped $\hat x_0$, so that both belong to the same $x_t$. diffusers combines the
      clipped $\hat x_0$ with the noise predicted before clipping.

    Examples:
        >>> scheduler = DDIMScheduler(timestep_spacing="trailing")
        >>> scheduler.set_timesteps(4)
        >>> x_t = torch.zeros(1, 3, 8, 8)
        >>> scheduler.step(torch.zeros(1, 3, 8, 8), 249, x_t).prev_sample.abs().max()
        tensor(0.)
    """

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        r"""Take one reverse step, see `GaussianDiffusion.ddim_posterior`.

        Args:
            model_output: Output of the network at `timestep`, shape `(B, C, H, W)`, or `(B, 2C, H, W)` with a learned
                variance, which is ignored.
            timestep: One of `self.timesteps`.
            sample: $x_t$, shape `(B, C, H, W)`.
            eta: $\eta$ in [0, 1]: 0 is deterministic, 1 is `DDPMScheduler` with `fixed_small`.
            generator: Random generator for the noise, or a list with one per image.
            return_dict: Return a `DDPMSchedulerOutput` instead of a tuple.

        Returns:
            $x_{t-1}$ as `.prev_sample` and $\hat x_0$ as `.pred_original_sample`, or a tuple of both, in the dtype of
                `sample`.

        Raises:
            ValueError: If `eta` lies outside [0, 1], `timestep` is not one of `self.timesteps`, or the shapes do not
                match.
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta={eta}: expected a number in [0, 1]")
        t, x_t, prediction, _ = self._read(model_output, timestep, sample)
        ddpm_mean, x_start = self._estimate(prediction, x_t, t)
        mean, std = self._chain.ddim_posterior(x_start, x_t, t, eta)
        if eta == 1:
            mean = ddpm_mean  # identical, except for prediction_type="mean"
        return self._result(mean, std, x_start, model_output.dtype, sample, generator, return_dict)

    def step_back(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, below: Tensor) -> Tensor:
        r"""Take a deterministic step in the forward direction, up to `timestep`.

        See `GaussianDiffusion.ddim_inverse`. The step needs the noise predicted at its own result. Repeat it with the
        result as `sample`: the results converge to the $x_t$ from which `step` leads to `below`.

        Args:
            model_output: Output of the network for `sample` at `timestep`, shape `(B, C, H, W)`, or `(B, 2C, H, W)`
                with a learned variance, which is ignored.
            timestep: One of `self.timesteps`.
            sample: An estimate of $x_t$, such as `below`, shape `(B, C, H, W)`.
            below: Images at the timestep that follows `timestep` in `self.timesteps`, or $x_0$ after the last one,
                same shape.

        Returns:
            A better estimate of $x_t$, at least float32, same shape.

        Raises:
            ValueError: If `timestep` is not one of `self.timesteps`, or the shapes do not match.
        """
        t, x_t, prediction, _ = self._read(model_output, timestep, sample)
        _, x_start = self._estimate(prediction, x_t, t)
        return self._chain.ddim_inverse(self._chain.predict_eps(x_start, x_t, t), below, t - 1, t)
