r"""Image editing without further training: inpainting, variations, DDIM inversion.

Timesteps `t` are 0-based. Images may be PIL images, arrays or tensors, see `hf_ddpm.images.read_signed`.
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
    """Methods of `DDPMPipeline` that edit images."""

    # Defined by DDPMPipeline.
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
        r"""Inpaint parts of images with RePaint (Lugmayr et al. 2022, Algorithm 1); other pixels do not change.

        Let $m$ be 1 at known pixels and 0 at pixels to fill. Each step of the reverse process is

        $$
        x_{t-1} = m \odot x_{t-1}^\text{known} + (1 - m) \odot x_{t-1}^\text{unknown}, \quad
        x_{t-1}^\text{known} \sim q(x_{t-1} \mid x_0), \; x_{t-1}^\text{unknown} \sim p_\theta(x_{t-1} \mid x_t)
        \tag{8}
        $$

        At every `jump_length`-th step $s$, the images are then diffused again, $x_{s+j} \sim q(x_{s+j} \mid x_s)$ with
        $j$ = `jump_length`, and the reverse process repeats these steps, so that both parts fit together (Section 4.2).
        Line 5 of Algorithm 1 is printed with $\bar\alpha_t$; this implementation uses $\bar\alpha_{t-1}$, as
        $q(x_{t-1} \mid x_0)$ requires.

        The filled pixels do not exactly follow $p_\theta$ given the known pixels: each step sees the known pixels with
        new noise, so the filled pixels depend too weakly on them. More jumps, shorter jumps and more steps reduce the
        error, but not to zero. For Gaussian data with a correlation of 0.9 between neighbors, the mean is off by 0.65
        standard deviations without jumps, by 0.15 with `jump_n_sample=5` and by 0.07 with `jump_n_sample=20`
        (`tests/pipelines/test_editing.py`).

        An image with an empty mask is returned unchanged. An image with a full mask is sampled as in `__call__`.

        Args:
            images: The images $x_0$: PIL images, arrays or tensors, see `hf_ddpm.images.read_signed`.
            masks: Masks that are white, or 1, at the pixels to fill; gray counts as white from one half of the range.
                One mask for all images, or one per image: PIL images, arrays or tensors with the height and width of
                the images, see `hf_ddpm.images.read_masks`.
            generator: Random generator for the noise, or a list with one per image; with a list, results do not depend
                on the batch.
            num_inference_steps: Number of steps of the reverse process, at least 1; None, or more than the network
                has, for all timesteps.
            jump_length: Length $j$ of a jump in steps, at least 1.
            jump_n_sample: Number of repeats of each part of `jump_length` steps, at least 1; 1 for no jumps. The
                network is evaluated about `num_inference_steps * jump_n_sample` times.
            class_labels: Class labels, one per image, see `__call__`.
            guidance_scale: See `__call__`.
            output_type: See `__call__`.
            return_dict: Return an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end: See `__call__`. Called after each step; its `latents` are $x_{t-1}$ of Eq. 8.
            callback_on_step_end_tensor_inputs: See `__call__`.

        Returns:
            The images, as `.images` or in a tuple.

        Raises:
            ValueError: If an argument is invalid, or the scheduler is not a `DDPMScheduler` of this package.
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
            logger.warning(
                f"jump_length={jump_length}: too long for a jump in {len(plain)} steps; use a smaller jump_length or "
                "more steps"
            )
        classes = self._classes(class_labels, len(x_start), guidance_scale)

        x_0 = randn_tensor(x_start.shape, generator=generator, device=x_start.device, dtype=torch.float32)
        is_whole, is_part = is_filled.flatten(1).all(1), is_filled.flatten(1).any(1)
        for rows, states in ((is_whole, plain), (is_part & ~is_whole, path)):
            rows = rows.nonzero().flatten()
            if len(rows) == 0:
                continue
            generators = [generator[row] for row in rows.tolist()] if isinstance(generator, list) else generator
            callback, inputs = callback_on_step_end, callback_on_step_end_tensor_inputs
            if states is path:
                callback = _keeping(self.scheduler, path, x_start[rows], is_filled[rows], generators, callback, inputs)
                inputs = self._callback_tensor_inputs
            step = partial(self.scheduler.step, **self._step_options(generators, eta=0.0))
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
        r"""Generate variations of images with SDEdit (Meng et al. 2022, Algorithm 1).

        This is `reconstruct` at the timestep that belongs to `strength`:

        $$
        x_t \sim q(x_t \mid x_0), \quad \bar x_0 \sim p_\theta(x_0 \mid x_t), \quad t + 1 = s \, T
        $$

        It can also turn a rough drawing into a realistic image: the model replaces the details lost in the noise.

        Args:
            images: The images $x_0$: PIL images, arrays or tensors, see `hf_ddpm.images.read_signed`.
            strength: Strength $s$ in (0, 1]: near 0 an image hardly changes; at 1 nothing of it is preserved.
            generator: Random generator for the noise of both directions, or a list with one per image.
            output_type: See `__call__`.
            **options: `num_inference_steps`, by default all steps from `t` down; `class_labels` and `guidance_scale`,
                see `__call__`.

        Returns:
            The variations, one per image.

        Raises:
            ValueError: If an argument is invalid, or the scheduler is not a `DDPMScheduler` of this package.
            FloatingPointError: If the network's output is not finite.
        """
        if not 0 < strength <= 1:
            raise ValueError(f"strength={strength}: expected a number above 0 and at most 1")
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
        r"""Find the latents from which DDIM generates the given images (Song et al. 2021, Section 5.4).

        DDIM steps are taken in the forward direction:

        $$
        x_t = \sqrt{\bar\alpha_t / \bar\alpha_{t-1}} \left(x_{t-1}
        - \sqrt{1 - \bar\alpha_{t-1}} \, \epsilon_\theta(x_t, t)\right)
        + \sqrt{1 - \bar\alpha_t} \, \epsilon_\theta(x_t, t)
        $$

        Each step solves this equation for $x_t$ by fixed-point iteration, starting from $x_{t-1}$ (Pan et al. 2023).
        Inversion is deterministic. The `DDIMScheduler` of this package reverses it with the same number of steps:

            pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
            latents = pipe.invert(images, num_inference_steps=100)
            pipe(len(latents), latents=latents, num_inference_steps=100).images

        If `t` is given, `pipe.decode(latents, t, num_inference_steps=100)` reverses it. More steps give a smaller
        reconstruction error.

        Args:
            images: The images $x_0$: PIL images, arrays or tensors, see `hf_ddpm.images.read_signed`.
            num_inference_steps: Number of steps; by default all.
            t: Timestep of the latents, in [0, T), with the timesteps of `decode`; by default the last timestep, with
                the timesteps of `__call__`.
            num_iterations: Network evaluations per step, at least 1; with 1, the noise predicted at $x_{t-1}$ is used
                in place of that at $x_t$.
            class_labels: Class labels, one per image, see `__call__`.
            guidance_scale: See `__call__`.

        Returns:
            The latents, float32, shape `(B, C, H, W)`.

        Raises:
            ValueError: If an argument is invalid, or the scheduler is not a `DDPMScheduler` of this package.
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
    """Return the states visited by RePaint in order (Lugmayr et al. 2022, Fig. 9).

    A state `i` is an index into the ascending timesteps. Each listed state is left by a reverse step to state `i - 1`;
    if the next listed state is larger, the images are then diffused up to it: a jump. From each of the states 0,
    `jump_length`, `2 * jump_length`, ... there are `jump_n_sample - 1` jumps of length `jump_length`, except where a
    jump would pass the first state.

    Args:
        num_steps: Number of steps of the reverse process without jumps.
        jump_length: Length of a jump, at least 1.
        jump_n_sample: Number of repeats of each part, at least 1.

    Returns:
        The states, from `num_steps - 1` to 0.

    Raises:
        ValueError: If `jump_length` or `jump_n_sample` is not a whole number of at least 1.

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
    """Raise a `ValueError` unless each count is a whole number of at least 1."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{name}={value!r}: expected a whole number of at least 1")


def _keeping(
    scheduler: Any,
    path: Sequence[int],
    x_start: Tensor,
    is_filled: Tensor,
    generator: Generators,
    callback: StepCallback | None,
    tensor_inputs: Sequence[str],
) -> StepCallback:
    """Return a callback that inserts the known pixels after each step, calls the user's callback, and jumps."""
    timesteps = [*scheduler.timesteps.flip(0).tolist(), -1]  # timestep of each state; state -1 is the final image

    def draw() -> Tensor:
        return randn_tensor(x_start.shape, generator=generator, device=x_start.device, dtype=torch.float32)

    def keep(pipe: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        state, following = path[i] - 1, [*path, -1][i + 1]
        known = x_start if state < 0 else scheduler.diffusion.q_sample(x_start, timesteps[state], draw())
        tensors["latents"] = latents = torch.where(is_filled, tensors["latents"], known)
        if callback is not None:
            selected = {name: tensors[name] for name in tensor_inputs}
            latents = (callback(pipe, i, t, selected) or {}).get("latents", latents)
        if following > state:
            latents = scheduler.diffusion.q_jump(latents, timesteps[state], timesteps[following], draw())
        return {"latents": latents}

    return keep
