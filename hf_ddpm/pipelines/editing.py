r"""Image editing without further training: inpainting, variation, inversion.

Time `t` is 0-based, and images are given as in `hf_ddpm.pipelines.latents`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import ImagePipelineOutput
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from hf_ddpm.images import as_output, read_masks, read_signed, to_unit
from hf_ddpm.pipelines.latents import Generators, LatentMethods, steps_from
from hf_ddpm.schedulers.scheduling_ddim import DDIMScheduler

logger = logging.get_logger(__name__)

StepCallback = Callable[[Any, int, Tensor, dict[str, Tensor]], dict | None]


class EditingMethods(LatentMethods):
    """The part of `DDPMPipeline` that edits images."""

    # Of the pipeline.
    _callback_tensor_inputs: tuple[str, ...]
    _check_arguments: Callable[..., None]
    _set_timesteps: Callable[..., None]
    _step_options: Callable[..., dict[str, Any]]
    _classes: Callable[..., Tensor | None]
    _walk: Callable[..., Tensor]

    @torch.no_grad()
    def inpaint(
        self,
        images: Any,
        masks: Any,
        generator: Generators = None,
        num_inference_steps: int | None = 250,
        jump_length: int = 10,
        jump_n_sample: int = 10,
        class_labels: Tensor | list[int | str] | None = None,
        guidance_scale: float = 1.0,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        r"""Fills a part of images by RePaint (Lugmayr et al. 2022, Algorithm 1); the other pixels are kept exactly.

        With the mask $m$, 1 where an image is known, each step of the reverse process is

        $$
        x_{t-1} = m \odot x_{t-1}^\text{known} + (1 - m) \odot x_{t-1}^\text{unknown}, \quad
        x_{t-1}^\text{known} \sim q(x_{t-1} \mid x_0), \; x_{t-1}^\text{unknown} \sim p_\theta(x_{t-1} \mid x_t)
        \tag{8}
        $$

        Then, at every `jump_length`-th step $s$, the images are diffused again,
        $x_{s+j} \sim q(x_{s+j} \mid x_s)$, and come back, so that both parts fit together (Section 4.2).
        Line 5 of Algorithm 1 prints $\bar\alpha_t$; here it is $\bar\alpha_{t-1}$, that of
        $q(x_{t-1} \mid x_0)$.

        The fills are not exactly distributed as $p_\theta$ given the known pixels: each step sees these with
        fresh noise, so the fills depend too little on them. The error falls with more jumps, shorter ones and more
        steps, not to zero. For Gaussian data with neighbors correlated by 0.9, the mean is off by 0.65 standard
        deviations without jumps, by 0.15 with 5 passes and by 0.07 with 20 (`tests/pipelines/test_editing.py`).

        An image with an empty mask is returned unchanged; one with a full mask is sampled as in a call.

        Args:
            images: $x_0$: pictures of PIL, arrays or tensors, see `hf_ddpm.images.read_signed`.
            masks: White, or 1, where to fill; gray is white from one half on. One mask for all images, or one per
                image: pictures of PIL, arrays or tensors of the images' height and width, see
                `hf_ddpm.images.read_masks`.
            generator: Source of the noise; a list gives each image its own, and the image is then the same in any
                batch.
            num_inference_steps: Number of steps of the reverse process, at least 1; all of the network's if it has
                fewer, or if None.
            jump_length: Steps that a jump diffuses by, $j$, at least 1.
            jump_n_sample: How often each part of `jump_length` steps is walked, at least 1; 1 for no jumps. Together
                the network is evaluated about `num_inference_steps * jump_n_sample` times.
            class_labels: As in a call, one per image.
            guidance_scale: As in a call.
            output_type: As in a call.
            return_dict: Whether to wrap the result.
            callback_on_step_end: As in a call, after each step, with its `latents` as in the equation above.
            callback_on_step_end_tensor_inputs: As in a call.

        Returns:
            The images, as `.images` or in a tuple.

        Raises:
            ValueError: If an argument is not allowed, or the scheduler is not a `DDPMScheduler`.
            FloatingPointError: If the network's output is not finite.
        """
        self._check_step(0)
        x_start = read_signed(images, self.image_shape).to(self._execution_device)
        is_filled = read_masks(masks, len(x_start), self.image_shape[1:]).to(x_start.device)
        self._check_arguments(x_start.shape, generator, output_type, None, callback_on_step_end_tensor_inputs)
        total = len(self.scheduler)
        steps = total if num_inference_steps is None else min(num_inference_steps, total)
        self._set_timesteps(steps, None, from_noise=True)
        plain = list(reversed(range(len(self.scheduler.timesteps))))
        path = resampled(len(plain), jump_length, jump_n_sample)
        if jump_n_sample > 1 and path == plain:
            logger.warning(f"jump_length={jump_length}: no jumps in {len(plain)} steps; expected more steps")
        classes = self._classes(class_labels, len(x_start), guidance_scale)

        x_0 = randn_tensor(x_start.shape, generator=generator, device=x_start.device, dtype=torch.float32)
        is_whole, is_part = is_filled.flatten(1).all(1), is_filled.flatten(1).any(1)
        for rows, states in ((is_whole, plain), (is_part & ~is_whole, path)):
            rows = rows.nonzero().flatten()
            if len(rows) == 0:
                continue
            own = [generator[row] for row in rows.tolist()] if isinstance(generator, list) else generator
            callback, inputs = callback_on_step_end, callback_on_step_end_tensor_inputs
            if states is path:
                callback = _keeping(self.scheduler, path, x_start[rows], is_filled[rows], own, callback, inputs)
                inputs = self._callback_tensor_inputs
            step = partial(self.scheduler.step, **self._step_options(own, eta=0.0))
            timesteps, labels = self.scheduler.timesteps.flip(0)[states], None if classes is None else classes[rows]
            x_0[rows] = self._walk(x_0[rows], timesteps, step, labels, guidance_scale, callback, inputs)

        filled = as_output(to_unit(torch.where(is_filled, x_0, x_start)), output_type)
        return ImagePipelineOutput(images=filled) if return_dict else (filled,)

    def vary(
        self,
        images: Any,
        strength: float = 0.5,
        generator: Generators = None,
        output_type: str = "pil",
        **options: Any,
    ) -> Any:
        r"""Makes variations of images by SDEdit (Meng et al. 2022, Algorithm 1): `reconstruct` by a share of the steps.

        $$
        x_t \sim q(x_t \mid x_0), \quad \bar x_0 \sim p_\theta(x_0 \mid x_t), \quad t + 1 = s \, T
        $$

        It also makes an image of a rough drawing: what is lost in the noise comes back as the model's images have it.

        Args:
            images: $x_0$.
            strength: $s$ in (0, 1]: near 0 all of an image is kept, at 1 nothing.
            generator: Source of the noise, in both directions; a list gives each image its own.
            output_type: As in a call.
            options: `num_inference_steps`, by default all from `t` on; `class_labels` and `guidance_scale`, as in a
                call.

        Returns:
            The variations, one per image.

        Raises:
            ValueError: If an argument is not allowed, or the scheduler is not a `DDPMScheduler`.
        """
        if not 0 < strength <= 1:
            raise ValueError(f"strength={strength} is not allowed: above 0, at most 1")
        self._check_step(0)
        t = max(1, round(strength * len(self.scheduler))) - 1
        return self.reconstruct(images, t, generator, output_type, **options)

    @torch.no_grad()
    def invert(
        self,
        images: Any,
        num_inference_steps: int | None = None,
        t: int | None = None,
        num_iterations: int = 3,
        class_labels: Tensor | list[int | str] | None = None,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        r"""Finds the latents from which DDIM makes images, by its steps backwards (Song et al. 2021, Section 5.4).

        $$
        x_t = \sqrt{\bar\alpha_t / \bar\alpha_{t-1}} \left(x_{t-1}
        - \sqrt{1 - \bar\alpha_{t-1}} \, \epsilon_\theta(x_t, t)\right)
        + \sqrt{1 - \bar\alpha_t} \, \epsilon_\theta(x_t, t)
        $$

        an equation for $x_t$ that is solved by iteration from $x_{t-1}$ (Pan et al. 2023). Nothing is
        random. A `DDIMScheduler` of this package leads back, with the same steps::

            pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
            latents = pipe.invert(images, num_inference_steps=100)
            pipe(len(latents), latents=latents, num_inference_steps=100).images

        and with `t`, `pipe.decode(latents, t, num_inference_steps=100)`. What is lost shrinks with more steps.

        Args:
            images: $x_0$.
            num_inference_steps: Number of steps; all by default.
            t: Step in [0, T) to stop at, whose steps are those of `decode`; by default the steps are those of a call.
            num_iterations: Passes of the network per step, at least 1; 1 takes the noise predicted at
                $x_{t-1}$ for that at $x_t$.
            class_labels: As in a call, one per image.
            guidance_scale: As in a call.

        Returns:
            The latents, float32, shape `(B, C, H, W)`.

        Raises:
            ValueError: If an argument is not allowed, or the scheduler is not a `DDPMScheduler`.
            FloatingPointError: If the network's output is not finite.
        """
        self._check_step(0 if t is None else t)
        _check_counts(num_iterations=num_iterations)
        x_start = read_signed(images, self.image_shape).to(self._execution_device)
        steps = None if t is None else steps_from(t, num_inference_steps)
        self._set_timesteps(num_inference_steps, steps, from_noise=False)
        ddim = DDIMScheduler.from_config(self.scheduler.config)
        ddim.set_timesteps(timesteps=self.scheduler.timesteps.tolist())
        below, passes = x_start, 0

        def climb(prediction: Tensor, timestep: Tensor, guess: Tensor) -> DDPMSchedulerOutput:
            nonlocal below, passes
            x_t, passes = ddim.step_back(prediction, timestep, guess, below), passes + 1
            below = x_t if passes % num_iterations == 0 else below
            return DDPMSchedulerOutput(prev_sample=x_t)

        timesteps = self.scheduler.timesteps.flip(0).repeat_interleave(num_iterations)
        classes = self._classes(class_labels, len(x_start), guidance_scale)
        return self._walk(x_start, timesteps, climb, classes, guidance_scale)


def resampled(num_steps: int, jump_length: int, jump_n_sample: int) -> list[int]:
    """Returns the steps of RePaint in order (Lugmayr et al. 2022, Fig. 9): each is a step to the number below.

    If the next number is larger, the images are diffused up to it. The steps to 0, `jump_length`,
    `2 * jump_length`, ... (if a jump from there stays below the start) are followed by `jump_n_sample - 1` jumps each.

    Args:
        num_steps: Number of steps of the reverse process without jumps.
        jump_length: Length of a jump, at least 1.
        jump_n_sample: How often each part is walked, at least 1.

    Raises:
        ValueError: If an argument is not allowed.

    Examples:
        >>> resampled(5, jump_length=2, jump_n_sample=2)
        [4, 3, 4, 3, 2, 1, 2, 1, 0]
    """
    _check_counts(jump_length=jump_length, jump_n_sample=jump_n_sample)
    jumps = dict.fromkeys(range(0, num_steps - jump_length, jump_length), jump_n_sample - 1)
    states, state = [], num_steps - 1
    while state >= 0:
        states.append(state)
        state -= 1
        if jumps.get(state, 0) > 0:
            jumps[state] -= 1
            state += jump_length
    return states


def _check_counts(**counts: Any) -> None:
    """Raises a `ValueError` unless each is a whole number, at least 1."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{name}={value!r} is not allowed: a whole number, at least 1")


def _keeping(
    scheduler: Any,
    path: Sequence[int],
    x_start: Tensor,
    is_filled: Tensor,
    generator: Generators,
    callback: StepCallback | None,
    tensor_inputs: Sequence[str],
) -> StepCallback:
    """Returns a callback that puts the known pixels in place after each step, calls another one, and jumps."""
    times = [*scheduler.timesteps.flip(0).tolist(), -1]  # by state; the last state is -1

    def draw() -> Tensor:
        return randn_tensor(x_start.shape, generator=generator, device=x_start.device, dtype=torch.float32)

    def keep(pipe: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        state, following = path[i] - 1, [*path, -1][i + 1]
        known = x_start if state < 0 else scheduler.diffusion.q_sample(x_start, times[state], draw())
        tensors["latents"] = latents = torch.where(is_filled, tensors["latents"], known)
        if callback is not None:
            wanted = {name: tensors[name] for name in tensor_inputs}
            latents = (callback(pipe, i, t, wanted) or {}).get("latents", latents)
        if following > state:
            latents = scheduler.diffusion.q_jump(latents, times[state], times[following], draw())
        return {"latents": latents}

    return keep
