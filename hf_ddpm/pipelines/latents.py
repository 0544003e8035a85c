r"""What the paper does with latents, the $x_t$ of an image: its figures as methods of the pipeline.

Time `t` is 0-based, as everywhere in this package: `t` is the paper's $t$ minus 1, and an image at `t` has been
diffused by `t + 1` steps. Images are given as pictures of PIL, arrays or tensors, see `hf_ddpm.images.read_signed`.
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
    r"""Estimates along a reverse process.

    Attributes:
        images: $\hat x_0$ of each frame in turn, in the output type asked for: the images of a batch.
        timesteps: The `t` of each frame, descending: what $x_t$ the estimate was made from.
    """

    images: list[Any]
    timesteps: list[int]


class Trace(NamedTuple):
    """What reverse processes pass through.

    Attributes:
        latents: By step `t`, the $x_t$, float32, shape `(batch_size, C, H, W)`.
        images: The images that the processes end with, in the output type asked for.
    """

    latents: dict[int, Tensor]
    images: Any


class LatentMethods:
    """The part of `DDPMPipeline` that goes to latents and comes back from them."""

    scheduler: Any
    image_shape: tuple[int, int, int]
    _execution_device: torch.device

    @torch.no_grad()
    def encode(self, images: Any, t: int, generator: Generators = None) -> Tensor:
        r"""Diffuses images to step `t`, by the stochastic encoder of Section 4.4.

        $$
        x_t \sim q(x_t \mid x_0) \tag{4}
        $$

        Args:
            images: $x_0$.
            t: Step in [0, T).
            generator: Source of the noise; a list gives each image its own.

        Returns:
            $x_t$, float32, shape `(B, C, H, W)`.

        Raises:
            ValueError: If an argument is not allowed, or the scheduler is not a `DDPMScheduler`.
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
        r"""Takes the reverse process from step `t` to its end, step by step.

        $$
        x_0 \sim p_\theta(x_0 \mid x_t)
        $$

        Args:
            latents: $x_t$, shape `(B, C, H, W)`.
            t: Step in [0, T).
            generator: Source of the noise; a list gives each image its own.
            output_type: As in a call.
            num_inference_steps: Number of steps, evenly spread and the first at `t`, in [1, t + 1]; all by default.
            options: `class_labels` and `guidance_scale`, as in a call.

        Returns:
            The images.

        Raises:
            ValueError: If an argument is not allowed, or the scheduler is not a `DDPMScheduler`.
        """
        self._check_step(t)
        steps = steps_from(t, num_inference_steps)
        return self(  # type: ignore[operator]
            len(latents), generator, output_type=output_type, latents=latents, timesteps=steps, **options
        ).images

    def reconstruct(
        self, images: Any, t: int, generator: Generators = None, output_type: str = "pil", **options: Any
    ) -> Any:
        r"""Diffuses images to step `t` and takes the reverse process back from there: `encode`, then `decode`.

        $$
        x_t \sim q(x_t \mid x_0), \quad \bar x_0 \sim p_\theta(x_0 \mid x_t)
        $$

        The later the step the less of an image is kept: near 0 all, near `T` nothing (Section 4.3).

        Args:
            images: $x_0$.
            t: Step in [0, T).
            generator: Source of the noise, in both directions; a list gives each image its own.
            output_type: As in a call.
            options: `num_inference_steps` of `decode`; `class_labels` and `guidance_scale`, as in a call.

        Returns:
            The reconstructions.

        Raises:
            ValueError: If an argument is not allowed, or the scheduler is not a `DDPMScheduler`.
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
        r"""Mixes two images where they have been diffused to, and comes back (Section 4.4, Figs. 8 and 9).

        $$
        x_t \sim q(x_t \mid x_0), \; x'_t \sim q(x_t \mid x'_0), \quad
        \bar x_0 \sim p_\theta(x_0 \mid \bar x_t), \; \bar x_t = (1 - \lambda) \, x_t + \lambda \, x'_t
        $$

        All that is drawn is the same for all weights: $x_t$, then $x'_t$, as `encode([first, second], t,
        generator)` draws them, then the noise of the reverse steps. So the images at the weights 0 and 1 are
        reconstructions, `decode` of either latent with the generator as `encode` has left it.

        Args:
            first: An image $x_0$.
            second: Another one, $x'_0$.
            t: Step in [0, T).
            weights: The $\lambda$, in [0, 1].
            generator: Source of the noise.
            output_type: As in a call.
            options: `num_inference_steps` of `decode`; `class_labels`, one per weight, and `guidance_scale`, as in a
                call.

        Returns:
            The images, one a weight.

        Raises:
            ValueError: If an argument is not allowed, or the scheduler is not a `DDPMScheduler`.
        """
        pair = [read_signed(image, self.image_shape) for image in (first, second)]
        for name, image in zip(("first", "second"), pair, strict=True):
            if len(image) != 1:
                raise ValueError(f"{name} of {len(image)} images is not allowed: one image")
        if isinstance(generator, list):
            raise ValueError(f"a list of {len(generator)} generators is not allowed: one, for all weights")
        if len(weights) == 0 or not all(0 <= weight <= 1 for weight in weights):
            raise ValueError(f"weights={list(weights)} are not allowed: at least one, in [0, 1]")
        generator = generator or torch.Generator().manual_seed(int(torch.randint(2**63 - 1, ())))
        x_t, other = self.encode(pair, t, generator)
        mixed = torch.stack([(1 - weight) * x_t + weight * other for weight in weights])
        # Generators in one state: the images of the batch get the same draws.
        same = [generator, *(generator.clone_state() for _ in weights[1:])]
        return self.decode(mixed, t, same, output_type, **options)

    def progressive(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        num_inference_steps: int | None = None,
        frames: int | Sequence[int] | None = 11,
        output_type: str = "pil",
        **options: Any,
    ) -> Frames:
        r"""Samples images and shows what is known of them on the way (Section 4.3, Fig. 6).

        $$
        \hat x_0 = (x_t - \sqrt{1 - \bar\alpha_t} \, \epsilon_\theta(x_t)) / \sqrt{\bar\alpha_t} \tag{15}
        $$

        as the scheduler keeps it within the range of images. With a `DDPMScheduler` the last frame is the images.

        Args:
            batch_size: Number of images.
            generator: As in a call: the same images come out.
            num_inference_steps: Number of steps of the reverse process; all of the network's by default.
            frames: How many steps to show, evenly spread, the first and the last among them; or which, by their `t`;
                all if None.
            output_type: As in a call.
            options: Further arguments of a call, such as `class_labels` or `latents`.

        Returns:
            The estimates, in the order of the process, and the steps they belong to.

        Raises:
            ValueError: If an argument is not allowed, or the scheduler does not give the estimate.
        """
        if isinstance(frames, int) and frames < 1:
            raise ValueError(f"frames={frames} is not allowed: at least 1, or None for all steps")
        seen = Frames([], [])

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
                raise ValueError(f"progressive is not allowed with a {type(pipe.scheduler).__name__}: it has no x_0")
            seen.images.append(as_output(to_unit(x_start), output_type))
            seen.timesteps.append(int(t))

        self(  # type: ignore[operator]
            batch_size,
            generator,
            num_inference_steps,
            output_type,
            callback_on_step_end=show,
            callback_on_step_end_tensor_inputs=["pred_original_sample"],
            **options,
        )
        return seen

    def trace(
        self,
        timesteps: Sequence[int],
        batch_size: int = 1,
        generator: Generators = None,
        output_type: str = "pil",
        **options: Any,
    ) -> Trace:
        r"""Samples images and keeps some of the latents on the way, $x_t \sim p_\theta(x_t)$.

        Args:
            timesteps: Which, in [0, T); at `T - 1` it is $x_T$, that the process starts from.
            batch_size: Number of images.
            generator: Source of the noise, as in a call of all steps: the same images come out.
            output_type: As in a call.
            options: `class_labels` and `guidance_scale`, as in a call.

        Returns:
            The latents and the images.

        Raises:
            ValueError: If an argument is not allowed, or the scheduler is not a `DDPMScheduler`.
        """
        for t in timesteps:
            self._check_step(t)
        check_generators(generator, batch_size)
        shape, last = (max(batch_size, 0), *self.image_shape), len(self.scheduler) - 1
        x_t = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        passed = {last: x_t}

        def keep(pipe: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> None:
            if int(t) - 1 in timesteps:
                passed[int(t) - 1] = tensors["latents"]

        images = self(  # type: ignore[operator]
            batch_size,
            generator,
            output_type=output_type,
            latents=x_t,
            callback_on_step_end=keep,
            timesteps=list(range(last, -1, -1)),
            **options,
        ).images
        return Trace({t: passed[t] for t in timesteps}, images)

    def share_latent(
        self,
        t: int,
        num_images: int = 4,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        latents: Tensor | None = None,
        **options: Any,
    ) -> Any:
        r"""Samples several images from each of some latents (Section 4.3, Fig. 7).

        $$
        x_0^{(1)}, x_0^{(2)}, \dots \sim p_\theta(x_0 \mid x_t)
        $$

        The smaller `t`, the more the images of a latent have in common.

        Args:
            t: Step in [0, T).
            num_images: Images of each latent.
            generator: Source of the noise.
            output_type: As in a call.
            latents: The $x_t$, shape `(B, C, H, W)`; by default one, of the `trace` of the same generator.
            options: `class_labels`, one a latent, and `guidance_scale`, as in a call.

        Returns:
            The images, those of the first latent first.

        Raises:
            ValueError: If an argument is not allowed, or the scheduler is not a `DDPMScheduler`.
        """
        if num_images < 1:
            raise ValueError(f"num_images={num_images} is not allowed: at least 1")
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
                f"scheduler={library}.{name} is not allowed: expected a DDPMScheduler of hf_ddpm, "
                "pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)"
            )
        if isinstance(t, bool) or not isinstance(t, int | np.integer) or not 0 <= t < len(self.scheduler):
            raise ValueError(f"t={t} is not in [0, {len(self.scheduler)})")


def steps_from(t: int, count: int | None) -> list[int]:
    """Returns so many steps, evenly spread from `t` down, all by default; a `ValueError` unless there are as many."""
    count = t + 1 if count is None else count
    if not 1 <= count <= t + 1:
        raise ValueError(f"num_inference_steps={count} from t={t}: expected 1 to {t + 1}")
    return [(count - i) * (t + 1) // count - 1 for i in range(count)]


def check_generators(generator: Generators, batch_size: int) -> None:
    """Raises a `ValueError` if generators come as a list, but not one an image."""
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(f"{len(generator)} generators for batch_size={batch_size}: one an image, or one alone")


def _spread(frames: int | None, total: int) -> Container[int]:
    """Returns the places of evenly spread frames among `total` steps; a single one is the last."""
    return range(total) if frames is None else set(np.linspace(total - 1, 0, frames).round().astype(int).tolist())
