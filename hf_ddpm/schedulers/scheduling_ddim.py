"""DDIM on the respaced process: the marginals of DDPM with less noise per step, or none."""

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from torch import Tensor

from hf_ddpm.schedulers.scheduling_ddpm import DDPMScheduler


class DDIMScheduler(DDPMScheduler):
    r"""Walks from :math:`x_T` to :math:`x_0` by DDIM (Song et al. 2021), from deterministic to as random as DDPM.

    Options are those of `DDPMScheduler`. It differs from `diffusers.DDIMScheduler` in two ways:

    - A step leads to the next timestep, whatever the spacing. That of diffusers leads to
      :math:`t - \lfloor T / S \rfloor`, which leaves noise in the images with `linspace`, and with `trailing` if `S`
      does not divide `T`.
    - The noise is computed from the clipped :math:`\hat x_0`, so that both belong to the same :math:`x_t`. diffusers
      combines the clipped image with the noise predicted before clipping.

    Example:
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
        r"""Takes one step, see `GaussianDiffusion.ddim_posterior`.

        Args:
            model_output: Prediction of the network at `timestep`, shape `(B, C, H, W)`; outputs for the variance are
                not used.
            timestep: One of `self.timesteps`.
            sample: :math:`x_t`, same shape.
            eta: :math:`\eta` in [0, 1]: 0 is deterministic, 1 is `DDPMScheduler` with `fixed_small`.
            generator: Source of the noise; a list gives each image its own.
            return_dict: Whether to wrap the result.

        Returns:
            :math:`x_{t-1}` as `.prev_sample` and :math:`\hat x_0` as `.pred_original_sample`, or both in a tuple, in
            the dtype of `sample`.

        Raises:
            ValueError: If `eta` lies outside [0, 1], or as of `DDPMScheduler.step`.
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta={eta} is not allowed: in [0, 1]")
        t, x_t, prediction, _ = self._read(model_output, timestep, sample)
        ddpm_mean, x_start = self._estimate(prediction, x_t, t)
        mean, std = self._chain.ddim_posterior(x_start, x_t, t, eta)
        if eta == 1:
            mean = ddpm_mean  # the same, but for predictions of type `mean`
        return self._result(mean, std, x_start, model_output.dtype, sample, generator, return_dict)

    def step_back(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, below: Tensor) -> Tensor:
        r"""Takes a deterministic step in the other direction, up to `timestep`: see `GaussianDiffusion.ddim_inverse`.

        The noise that it needs is that of the result itself: repeated with the result as `sample`, the step converges
        to the :math:`x_t` from which `step` leads to `below`.

        Args:
            model_output: Prediction of the network for `sample` at `timestep`, shape `(B, C, H, W)`.
            timestep: One of `self.timesteps`.
            sample: An estimate of :math:`x_t`, such as `below`, same shape.
            below: The images at the timestep below, or :math:`x_0` below the last one, same shape.

        Returns:
            A better estimate of :math:`x_t`, float32.

        Raises:
            ValueError: As of `DDPMScheduler.step`.
        """
        t, x_t, prediction, _ = self._read(model_output, timestep, sample)
        _, x_start = self._estimate(prediction, x_t, t)
        return self._chain.ddim_inverse(self._chain.predict_eps(x_start, x_t, t), below, t - 1, t)
