r"""Pipeline methods for latents: encode, decode, reconstruct, interpolate, progressive sampling, shared latents.

Latents are the diffused images $x_t$. Timesteps are 0-based, as everywhere in this package: `t` is the paper's $t$
minus 1, and an image at `t` has been diffused by `t + 1` steps. Images may be PIL images, arrays or tensors, see
`hf_ddpm.images.read_signed`.
"""

from collections.abc import Container, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from hf_ddpm.images import as_output, read_signed, to_unit
from hf_ddpm.schedulers.scheduling_ddpm import DDPMScheduler

Generators = torch.Generator | list[torch.Generator] | None


class Frames(NamedTuple):
    r"""Estimates of the image during sampling.

    Attributes:
        images: The estimates $\hat x_0$ of the batch, one entry per frame, in the requested output type.
        timesteps: The timestep `t` of each frame, descending; the frame is estimated from $x_t$.
    """

    images: list[Any]
    timesteps: list[int]


class Trace(NamedTuple):
    """Latents of sampling, and the samples.

    Attributes:
        latents: The $x_t$ by timestep `t`, float32, shape `(batch_size, C, H, W)`.
        images: The samples, in the requested output type.
    """

    latents: dict[int, Tensor]
    images: Any


class LatentMethods:
    """Methods of `DDPMPipeline` that diffuse images to latents, and generate images from latents."""

    scheduler: Any
    image_shape: tuple[int, int, int]
    _execution_device: torch.device

    @torch.no_grad()
    def encode(self, images: Any, t: int, generator: Generators = None) -> Tensor:
        r"""Diffuse images to timestep `t` (the stochastic encoder of Section 4.4).

        $$
        x_t \sim q(x_t \mid x_0) \tag{4}
        $$

        Args:
            images: The images $x_0$: PIL images, arrays or tensors, see `hf_ddpm.images.read_signed`.
            t: Timestep in [0, T).
            generator: Random generator for the noise, or a list with one per image.

        Returns:
            $x_t$, float32, shape `(B, C, H, W)`.

        Raises:
            ValueError: If an argument is invalid, or the scheduler is not a `DDPMScheduler` of this package.
        """
        self._check_step(t)
        x_start = read_signed(images, self.image_shape).to(self._execution_device)
        check_generators(generator, len(x_start))
        noise = randn_tensor(x_start.shape, generator=generator, device=x_start.device, dtype=torch.float32)
        return self.scheduler.diffusion.q_sample(x_start, t, noise)

    def decode(
        self,
        latents: Tensor,
        t: int,
        generator: Generators = None,
        output_type: str = "pil",
        num_inference_steps: int | None = None,
        **options: Any,
    ) -> Any:
        r"""Generate images from latents: run the reverse process from timestep `t` to its end.

        $$
        x_0 \sim p_\theta(x_0 \mid x_t)
        $$

        Args:
            latents: $x_t$, shape `(B, C, H, W)`.
            t: Timestep of the latents, in [0, T).
            generator: Random generator for the noise, or a list with one per image.
            output_type: See `__call__`.
            num_inference_steps: Number of steps, in [1, t + 1], evenly spaced and starting at `t`; by default `t + 1`.
            **options: `class_labels` and `guidance_scale`, see `__call__`.

        Returns:
            The images.

        Raises:
            ValueError: If an argument is invalid, or the scheduler is not a `DDPMScheduler` of this package.
            FloatingPointError: If the network's output is not finite.
        """
        self._check_step(t)
        steps = steps_from(t, num_inference_steps)
        return self(  # type: ignore[operator]
            len(latents), generator, output_type=output_type, latents=latents, timesteps=steps, **options
        ).images

    def reconstruct(
        self, images: Any, t: int, generator: Generators = None, output_type: str = "pil", **options: Any
    ) -> Any:
        r"""Diffuse images to timestep `t` and reconstruct them from there: `encode`, then `decode`.

        $$
        x_t \sim q(x_t \mid x_0), \quad \bar x_0 \sim p_\theta(x_0 \mid x_t)
        $$

        The larger `t` is, the less of an image is preserved: everything near 0, nothing near `T` (Section 4.3).

        Args:
            images: The images $x_0$: PIL images, arrays or tensors, see `hf_ddpm.images.read_signed`.
            t: Timestep in [0, T).
            generator: Random generator for the noise of both directions, or a list with one per image.
            output_type: See `__call__`.
            **options: `num_inference_steps`, see `decode`; `class_labels` and `guidance_scale`, see `__call__`.

        Returns:
            The reconstructions.

        Raises:
            ValueError: If an argument is invalid, or the scheduler is not a `DDPMScheduler` of this package.
            FloatingPointError: If the network's output is not finite.
        """
        return self.decode(self.encode(images, t, generator), t, generator, output_type, **options)

    def interpolate(
        self,
        first: Any,
        second: Any,
        t: int,
        weights: Sequence[float],
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        **options: Any,
    ) -> Any:
        r"""Interpolate between two images in latent space (Section 4.4, Figs. 8 and 9).

        $$
        x_t \sim q(x_t \mid x_0), \; x'_t \sim q(x_t \mid x'_0), \quad
        \bar x_0 \sim p_\theta(x_0 \mid \bar x_t), \; \bar x_t = (1 - \lambda) \, x_t + \lambda \, x'_t
        $$

        All weights use the same random numbers: first those of `encode([first, second], t, generator)`, which returns
        $x_t$ and $x'_t$, then the noise of the reverse steps. The weights 0 and 1 therefore give reconstructions: the
        same as `decode` of $x_t$ or $x'_t$ with the generator in its state after `encode`.

        Args:
            first: The image $x_0$: a PIL image, an array or a tensor, see `hf_ddpm.images.read_signed`.
            second: The image $x'_0$.
            t: Timestep in [0, T).
            weights: The weights $\lambda$, each in [0, 1].
            generator: Random generator for the noise.
            output_type: See `__call__`.
            **options: `num_inference_steps`, see `decode`; `class_labels`, one per weight, and `guidance_scale`, see
                `__call__`.

        Returns:
            The images, one per weight.

        Raises:
            ValueError: If an argument is invalid, or the scheduler is not a `DDPMScheduler` of this package.
            FloatingPointError: If the network's output is not finite.
        """
        pair = [read_signed(image, self.image_shape) for image in (first, second)]
        for name, image in zip(("first", "second"), pair, strict=True):
            if len(image) != 1:
                raise ValueError(f"{name} of {len(image)} images: expected one image")
        if isinstance(generator, list):
            raise ValueError(f"generator of {len(generator)} generators: expected one generator for all weights")
        if len(weights) == 0 or not all(0 <= weight <= 1 for weight in weights):
            raise ValueError(f"weights={list(weights)}: expected at least one number, each in [0, 1]")
        generator = generator or torch.Generator().manual_seed(int(torch.randint(2**63 - 1, ())))
        x_t, other = self.encode(pair, t, generator)
        mixed = torch.stack([(1 - weight) * x_t + weight * other for weight in weights])
        # Generators in the same state, so that all images get the same noise.
        generators = [generator, *(generator.clone_state() for _ in weights[1:])]
        return self.decode(mixed, t, generators, output_type, **options)

    def progressive(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        num_inference_steps: int | None = None,
        frames: int | Sequence[int] | None = 11,
        output_type: str = "pil",
        **options: Any,
    ) -> Frames:
        r"""Sample images and return the estimates of them during sampling (Section 4.3, Fig. 6).

        $$
        \hat x_0 = (x_t - \sqrt{1 - \bar\alpha_t} \, \epsilon_\theta(x_t)) / \sqrt{\bar\alpha_t} \tag{15}
        $$

        The estimates are clipped by the scheduler. With a `DDPMScheduler` the last frame equals the samples.

        Args:
            batch_size: Number of images.
            generator: See `__call__`; the same generator gives the same images as there.
            num_inference_steps: Number of sampling steps; by default all timesteps of the network.
            frames: Number of frames, evenly spaced over the steps and including the first and the last one; or the
                timesteps `t` to return; None for all steps.
            output_type: See `__call__`.
            **options: Other arguments of `__call__`, such as `class_labels` or `latents`.

        Returns:
            The estimates, in the order of sampling, and their timesteps.

        Raises:
            ValueError: If an argument is invalid, or the scheduler does not return an estimate of the image.
            FloatingPointError: If the network's output is not finite.
        """
        if isinstance(frames, int) and frames < 1:
            raise ValueError(f"frames={frames}: expected at least 1, or None for all steps")
        shown = Frames([], [])

        def show(pipe: Any, i: int, t: Tensor, tensors: dict[str, Tensor | None]) -> None:
            is_shown = (
                int(t) in frames
                if isinstance(frames, Sequence)
                else i in _spread(frames, len(pipe.scheduler.timesteps))
            )
            if not is_shown:
                return
            x_start = tensors["pred_original_sample"]
            if x_start is None:
                raise ValueError(
                    f"scheduler {type(pipe.scheduler).__name__}: returns no estimate of x_0, which progressive needs; "
                    "use a DDPMScheduler or DDIMScheduler"
                )
            shown.images.append(as_output(to_unit(x_start), output_type))
            shown.timesteps.append(int(t))

        self(  # type: ignore[operator]
            batch_size,
            generator,
            num_inference_steps,
            output_type,
            callback_on_step_end=show,
            callback_on_step_end_tensor_inputs=["pred_original_sample"],
            **options,
        )
        return shown

    def trace(
        self,
        timesteps: Sequence[int],
        batch_size: int = 1,
        generator: Generators = None,
        output_type: str = "pil",
        **options: Any,
    ) -> Trace:
        r"""Sample images and return them with the latents at some timesteps, $x_t \sim p_\theta(x_t)$.

        Args:
            timesteps: Timesteps of the latents to return, in [0, T); at `T - 1` it is the noise that sampling starts
                from.
            batch_size: Number of images.
            generator: Random generator for the noise, or a list with one per image; gives the same images as
                `__call__` with all timesteps.
            output_type: See `__call__`.
            **options: `class_labels` and `guidance_scale`, see `__call__`.

        Returns:
            The latents and the images.

        Raises:
            ValueError: If an argument is invalid, or the scheduler is not a `DDPMScheduler` of this package.
            FloatingPointError: If the network's output is not finite.
        """
        for t in timesteps:
            self._check_step(t)
        check_generators(generator, batch_size)
        shape, last = (max(batch_size, 0), *self.image_shape), len(self.scheduler) - 1
        x_t = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        kept = {last: x_t}

        def keep(pipe: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> None:
            if int(t) - 1 in timesteps:
                kept[int(t) - 1] = tensors["latents"]

        images = self(  # type: ignore[operator]
            batch_size,
            generator,
            output_type=output_type,
            latents=x_t,
            callback_on_step_end=keep,
            timesteps=list(range(last, -1, -1)),
            **options,
        ).images
        return Trace({t: kept[t] for t in timesteps}, images)

    def share_latent(
        self,
        t: int,
        num_images: int = 4,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        latents: Tensor | None = None,
        **options: Any,
    ) -> Any:
        r"""Sample several images from each latent (Section 4.3, Fig. 7).

        $$
        x_0^{(1)}, x_0^{(2)}, \dots \sim p_\theta(x_0 \mid x_t)
        $$

        The smaller `t` is, the more the images of a latent have in common.

        Args:
            t: Timestep of the latents, in [0, T).
            num_images: Number of images per latent, at least 1.
            generator: Random generator for the noise.
            output_type: See `__call__`.
            latents: The latents $x_t$, shape `(B, C, H, W)`; by default a single one, drawn by `trace` with
                `generator`.
            **options: `class_labels`, one per latent, and `guidance_scale`, see `__call__`.

        Returns:
            The `B * num_images` images, grouped by latent.

        Raises:
            ValueError: If an argument is invalid, or the scheduler is not a `DDPMScheduler` of this package.
            FloatingPointError: If the network's output is not finite.
        """
        if num_images < 1:
            raise ValueError(f"num_images={num_images}: expected at least 1")
        if latents is None:
            latents = self.trace([t], 1, generator, **options).latents[t]
        labels = options.pop("class_labels", None)
        if labels is not None:
            labels = labels.tolist() if isinstance(labels, Tensor) else labels
            options["class_labels"] = [label for label in labels for _ in range(num_images)]
        return self.decode(latents.repeat_interleave(num_images, dim=0), t, generator, output_type, **options)

    def _check_step(self, t: int) -> None:
        if not isinstance(self.scheduler, DDPMScheduler):
            library, name = type(self.scheduler).__module__.split(".")[0], type(self.scheduler).__name__
            raise ValueError(
                f"scheduler={library}.{name}: expected a DDPMScheduler of hf_ddpm; set pipe.scheduler = "
                "hf_ddpm.DDPMScheduler.from_config(pipe.scheduler.config)"
            )
        if isinstance(t, bool) or not isinstance(t, int | np.integer) or not 0 <= t < len(self.scheduler):
            raise ValueError(f"t={t}: expected a whole number from 0 to {len(self.scheduler) - 1}")


def steps_from(t: int, count: int | None) -> list[int]:
    """Return `count` timesteps, evenly spaced from `t` down; by default all `t + 1`.

    Raises:
        ValueError: If `count` is not in [1, t + 1].
    """
    count = t + 1 if count is None else count
    if not 1 <= count <= t + 1:
        raise ValueError(f"num_inference_steps={count}: expected 1 to {t + 1} when starting at t={t}")
    return [(count - i) * (t + 1) // count - 1 for i in range(count)]


def check_generators(generator: Generators, batch_size: int) -> None:
    """Raise a `ValueError` unless `generator` is a generator, a list with one per image, or not given."""
    for one in generator if isinstance(generator, list) else [generator]:
        if not (one is None or isinstance(one, torch.Generator)):
            raise ValueError(
                f"generator={one!r}: expected torch.Generator().manual_seed(0), or a list with one per image"
            )
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(
            f"generator of {len(generator)} generators: expected a single generator or a list of {batch_size}, one per "
            "image"
        )


def _spread(frames: int | None, total: int) -> Container[int]:
    """Return the indices of evenly spaced frames among `total` steps; a single frame is the last step."""
    return range(total) if frames is None else set(np.linspace(total - 1, 0, frames).round().astype(int).tolist())
