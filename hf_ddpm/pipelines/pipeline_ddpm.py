"""The DDPM pipeline: sampling, guidance, and loading and saving in the format of diffusers."""

import inspect
import json
import math
import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Union

import diffusers
import numpy as np
import torch
from diffusers import ImagePipelineOutput, SchedulerMixin
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from hf_ddpm.diffusion.gaussian import NOISE_SIGNAL, is_noise, start_signal
from hf_ddpm.diffusion.outputs import split_output
from hf_ddpm.diffusion.schedules import check_one_of, trailing_timesteps
from hf_ddpm.images import OUTPUT_TYPES, as_output, check_picture, to_unit
from hf_ddpm.models.unet_2d import UNet2DModel
from hf_ddpm.pipelines.editing import EditingMethods, StepCallback
from hf_ddpm.pipelines.latents import Generators, check_generators
from hf_ddpm.pipelines.runs import stock_folder
from hf_ddpm.pipelines.sharing import SharingMethods
from hf_ddpm.schedulers.scheduling_ddim import DDIMScheduler
from hf_ddpm.schedulers.scheduling_ddpm import DDPMScheduler
from hf_ddpm.schedulers.stock import check_stock
from hf_ddpm.utils.files import one_line
from hf_ddpm.utils.runs import checkpoint_of
from hf_ddpm.utils.schema import conforms

logger = logging.get_logger(__name__)

# Classes of this package by their names in files. diffusers has no classes with the last two names, so it cannot
# load them: its DDPMScheduler would treat a learned log-variance as a variance; its DDIMScheduler takes other steps.
OURS = {
    "UNet2DModel": UNet2DModel,
    "DDPMScheduler": DDPMScheduler,
    "HFDDPMScheduler": DDPMScheduler,
    "HFDDIMScheduler": DDIMScheduler,
}


class DDPMPipeline(EditingMethods, SharingMethods):
    """Pipeline for image generation with a denoising diffusion probabilistic model (Ho et al. 2020).

    `from_pretrained` loads every DDPM repository of diffusers. `save_pretrained` writes the same format, so that
    `diffusers.DDPMPipeline` can load the model where this package is not installed.

    Args:
        unet: The network. A `diffusers.UNet2DModel` is accepted for architectures that `hf_ddpm.UNet2DModel` does not
            support.
        scheduler: The scheduler: of this package, or of diffusers. To change it, set
            `pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)`.
        id2label: Names of the classes of a class-conditional network, by index; the indices are text, as in JSON. If
            the network has one class embedding more than names, the last embedding stands for "no class".
        num_inference_steps: Default number of sampling steps, stored with distilled models; if None, all timesteps.

    Examples:
        An untrained network samples in two steps; use `from_pretrained` to load a trained model.

        >>> unet = UNet2DModel(8, 1, 1, block_out_channels=(8, 16), norm_num_groups=4,
        ...                    down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
        >>> pipe = DDPMPipeline(unet, DDPMScheduler())
        >>> pipe.set_progress_bar_config(disable=True)
        >>> pipe(batch_size=3, generator=torch.Generator().manual_seed(0), num_inference_steps=2).images[0].size
        (8, 8)
    """

    unet: Any
    scheduler: Any
    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ("latents", "pred_original_sample", "model_output")

    def __init__(
        self,
        # diffusers reads these annotations; before 0.36 it only understands Union.
        unet: Union[UNet2DModel, diffusers.UNet2DModel],  # noqa: UP007
        scheduler: Union[DDPMScheduler, SchedulerMixin],  # noqa: UP007
        id2label: dict[str, str] | None = None,
        num_inference_steps: int | None = None,
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self._num_timesteps = 0
        self._alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)  # of the process the network was trained for
        if id2label is not None:
            self.register_to_config(id2label=id2label)
        if num_inference_steps is not None:
            self.register_to_config(num_inference_steps=num_inference_steps)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape `(C, H, W)` of an image."""
        size = self.unet.config.sample_size
        if size is None:
            raise ValueError("sample_size=None in the configuration of the U-Net: expected the size of its images")
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.in_channels, height, width

    @property
    def default_steps(self) -> int:
        """Default number of sampling steps."""
        return self.config.get("num_inference_steps") or int(self.scheduler.config.num_train_timesteps)

    @property
    def is_distilled(self) -> bool:
        """Whether the model was distilled, so that its network is trained for `default_steps` timesteps only."""
        return self.default_steps < int(self.scheduler.config.num_train_timesteps)

    @property
    def is_guided(self) -> bool:
        """Whether the model is sampled with guidance: trained for it, and not distilled, which builds guidance in."""
        return self.null_class is not None and not self.is_distilled

    @property
    def class_names(self) -> list[str]:
        """The names of the classes, ordered by index; empty without class names."""
        id2label = self.config.get("id2label", {})
        return [id2label[str(index)] for index in range(len(id2label))]  # in files, indices are sorted as text

    @property
    def num_timesteps(self) -> int:
        """Number of network evaluations of the current or last call."""
        return self._num_timesteps

    @property
    def null_class(self) -> int | None:
        """Index of the "no class" embedding, or None if the network was trained without it."""
        embeddings, names = self.unet.config.num_class_embeds, self.class_names
        return len(names) if names and embeddings == len(names) + 1 else None

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        latents: Tensor | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        class_labels: Tensor | list[int | str] | None = None,
        guidance_scale: float = 1.0,
        timesteps: list[int] | None = None,
        eta: float = 0.0,
    ) -> ImagePipelineOutput | tuple:
        r"""Sample images (Algorithm 2).

        Args:
            batch_size: Number of images.
            generator: Random generator for the noise, or a list of `batch_size` generators, one per image.
            num_inference_steps: Number of sampling steps; by default `default_steps`: all timesteps of the network, or
                the number of steps that the model was distilled to.
            output_type: `pil`, `np` or `numpy` (NHWC in [0, 1]), or `pt` (NCHW in [0, 1]).
            return_dict: Return an `ImagePipelineOutput` instead of a tuple.
            latents: $x_T$ to start from, shape `(batch_size, C, H, W)`; by default standard normal noise.
            callback_on_step_end: Called as `f(pipe, i, t, tensors)` after step `i`, where `tensors` is a dictionary of
                the tensors in `callback_on_step_end_tensor_inputs`. If it returns a dictionary with `latents`, they
                replace $x_{t-1}$.
            callback_on_step_end_tensor_inputs: Names of tensors: `latents` ($x_{t-1}$), `pred_original_sample`
                ($\hat x_0$, None if the scheduler does not return it) and `model_output`.
            class_labels: Classes of a class-conditional network: `batch_size` names or indices. By default "no class",
                if the network was trained with it.
            guidance_scale: Scale $s$ of classifier-free guidance (Ho & Salimans 2022),
                $\hat\epsilon = \epsilon_\theta(x_t) + s (\epsilon_\theta(x_t, c) - \epsilon_\theta(x_t))$; 1 for no
                guidance.
            timesteps: Timesteps to visit, descending, instead of `num_inference_steps`. With `latents`, the first one
                may be any timestep.
            eta: Amount of noise of a DDIM scheduler, from 0 (none) to 1 (as much as DDPM).

        Returns:
            The images, as `.images` or in a tuple.

        Raises:
            ValueError: If an argument is invalid, or if the scheduler is from diffusers and its settings would give
                wrong images.
            FloatingPointError: If the network's output is not finite; the message names the step and the cause.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: expected at least 1")
        shape = (batch_size, *self.image_shape)
        self._check_arguments(shape, generator, output_type, latents, callback_on_step_end_tensor_inputs)
        device = self._execution_device

        self._set_timesteps(num_inference_steps, timesteps, from_noise=latents is None)
        # Algorithm 2, line 1: x_T ~ N(0, I), in float32; only the network runs in its own dtype.
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        x_t = latents.to(device, torch.float32) * self.scheduler.init_noise_sigma
        # Line 3: z ~ N(0, I) if t > 1, else z = 0. Line 4: x_{t-1} = mu_theta(x_t, t) + sigma_t z.
        step = partial(self.scheduler.step, **self._step_options(generator, eta))
        classes = self._classes(class_labels, batch_size, guidance_scale)
        # Lines 2 to 5: for t = T, ..., 1, evaluate the network and call `step`.
        x_t = self._walk(
            x_t,
            self.scheduler.timesteps,
            step,
            classes,
            guidance_scale,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        # Line 6: return x_0, scaled from [-1, 1] to [0, 1].
        images = as_output(to_unit(x_t), output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "DDPMPipeline":
        """Load a pipeline from a Hub id, a pipeline folder, a training run or a checkpoint.

        Args:
            pretrained_model_name_or_path: Hub id, or the folder of a pipeline, of a training run (also while training
                continues), or of a checkpoint. From a run, its newest intact checkpoint is loaded if that is of a later
                step than the exported pipeline, else the exported pipeline.
            **kwargs: Arguments of `diffusers.DiffusionPipeline.from_pretrained`.

        Returns:
            The pipeline.

        Raises:
            ValueError: If a checkpoint is damaged.
        """
        while (checkpoint := checkpoint_of(pretrained_model_name_or_path, logger.warning)) is not None:
            try:
                with stock_folder(checkpoint) as folder:
                    pipe = super().from_pretrained(folder, **kwargs)
                pipe.register_to_config(_name_or_path=str(checkpoint))
                return pipe
            except Exception:
                if checkpoint.exists():  # else the run has deleted it since, and has a newer one
                    raise
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """Read the `model_index.json` of a pipeline, and replace diffusers classes by classes of this package.

        Args:
            *args: Arguments of `diffusers.DiffusionPipeline.load_config`.
            **kwargs: Keyword arguments of `diffusers.DiffusionPipeline.load_config`.

        Returns:
            The index, or a tuple that starts with the index, as in diffusers.

        Raises:
            ValueError: If the index has a missing or invalid entry; the message names key and value.
        """
        loaded = super().load_config(*args, **kwargs)
        index = loaded[0] if isinstance(loaded, tuple) else loaded
        try:
            _check_index(index)
        except ValueError as error:
            raise ValueError(f"model_index.json: {error}") from error
        for name, component in index.items():
            if isinstance(component, list) and component[0] == "diffusers" and component[1] in OURS:
                index[name] = ["hf_ddpm", OURS[component[1]].__name__]
        return loaded

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """Write the index of the pipeline, with classes of this package under their names in diffusers.

        Args:
            json_file_path: The file to write.
        """
        index = json.loads(self.to_json_string())
        index.pop("_name_or_path", None)
        for name, component in self.components.items():
            component = getattr(component, "_orig_mod", component)  # the original module behind torch.compile
            if any(type(component) is own for own in OURS.values()):
                index[name] = ["diffusers", stored_class(component)]
        Path(json_file_path).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _check_arguments(
        self,
        shape: tuple[int, ...],
        generator: Generators,
        output_type: str,
        latents: Tensor | None,
        tensor_inputs: list[str] | tuple[str, ...],
    ) -> None:
        check_one_of("output_type", output_type, OUTPUT_TYPES)
        if output_type == "pil":
            check_picture(shape[1], 'use output_type="np" or "pt"')
        check_generators(generator, shape[0])
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"latents of shape {tuple(latents.shape)}: expected shape {shape}")
        for name in tensor_inputs:
            if name not in self._callback_tensor_inputs:
                allowed = ", ".join(self._callback_tensor_inputs)
                raise ValueError(f"callback_on_step_end_tensor_inputs: unknown tensor {name!r}; expected {allowed}")

    def _set_timesteps(self, count: int | None, timesteps: list[int] | None, *, from_noise: bool) -> None:
        """Set the scheduler's timesteps; raise a `ValueError` if they would give wrong samples."""
        scheduler, pixels = self.scheduler, math.prod(self.image_shape[1:])
        if isinstance(scheduler, DDPMScheduler):
            scheduler.start_signal = start_signal(pixels)
        if timesteps is None:
            count = self.default_steps if count is None else count
            scheduler.set_timesteps(count)
        elif "timesteps" in inspect.signature(scheduler.set_timesteps).parameters:
            scheduler.set_timesteps(timesteps=timesteps)
        else:
            raise ValueError(f"timesteps: not supported by {type(scheduler).__name__}; use num_inference_steps instead")
        self._check_distilled_steps()
        end = float(getattr(scheduler, "alphas_cumprod", [0.0])[-1])
        if from_noise and end > NOISE_SIGNAL:
            logger.warning(
                f"sampling starts from noise, but x_T of this process keeps {end:.1%} of the variance of the image, so "
                "samples lack contrast; train with betas scaled to the number of timesteps"
            )
        if not isinstance(scheduler, DDPMScheduler):
            check_stock(scheduler, None if timesteps else count, from_noise=from_noise, pixels=pixels)
            self._check_process()
        elif from_noise and not is_noise(scheduler.diffusion.alphas_cumprod, int(scheduler.timesteps[0]), NOISE_SIGNAL):
            first = int(scheduler.timesteps[0])
            raise ValueError(
                f"timesteps from {first}: x_t is not yet noise there; pass latents, or start at a larger timestep"
            )

    def _check_distilled_steps(self) -> None:
        """Log a warning if the scheduler visits timesteps that a distilled model was not trained for."""
        if not self.is_distilled:
            return
        steps = self.default_steps
        trained = trailing_timesteps(int(self.scheduler.config.num_train_timesteps), steps)
        others = [t for t in self.scheduler.timesteps.tolist() if t not in trained]
        if others:
            warn_once(
                f"timestep {others[0]:g}: the model was distilled to {steps} steps and not trained for this timestep, "
                f"so images may be wrong; use num_inference_steps={steps}, or the model that it was distilled from"
            )

    def _check_process(self) -> None:
        """Raise a `ValueError` if the scheduler's betas differ from the betas of the pipeline's first scheduler."""
        own, other = self._alphas_cumprod, getattr(self.scheduler, "alphas_cumprod", None)
        if own is not None and other is not None and (len(own) != len(other) or not own.allclose(other, atol=0.01)):
            name = type(self.scheduler).__name__
            raise ValueError(
                f"scheduler {name}: its betas are not those the network was trained with; create it by "
                f"{name}.from_config with the configuration of the model's own scheduler"
            )

    def _check_finite(self, sums: list[Tensor]) -> None:
        """Raise a `FloatingPointError` with the first step whose values are not finite, and the cause."""
        is_finite = torch.stack(sums).isfinite()  # a single GPU synchronization per call
        if bool(is_finite.all()):
            return
        step = int((~is_finite).nonzero()[0])
        broken = [name for name, value in self.unet.named_parameters() if not bool(value.isfinite().all())]
        if broken:
            reason = f"some weights of the network are not finite, such as {broken[0]}"
        elif torch.float16 in (self.unet.dtype, torch.get_autocast_dtype(self.device.type)):
            reason = "float16 may have overflowed: use bfloat16 or float32"
        else:
            reason = "latents, guidance_scale or the network's output are out of range"
        raise FloatingPointError(f"values are not finite at step {step} of {len(sums) - 1}: {reason}")

    def _classes(
        self, labels: Tensor | list[int | str] | None, batch_size: int, guidance_scale: float
    ) -> Tensor | None:
        """Return the class indices, or None for an unconditional network."""
        count, names, null = self.unet.config.num_class_embeds, self.class_names, self.null_class
        if not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale={guidance_scale}: expected a finite number")
        if guidance_scale != 1 and null is None:
            raise ValueError(
                f"guidance_scale={guidance_scale}: the network was trained without class_dropout; expected 1"
            )
        if guidance_scale != 1 and self.is_distilled:
            warn_once(
                f"guidance_scale={guidance_scale}: guidance is applied twice if the model was distilled with guidance; "
                "use guidance_scale=1 for such a model"
            )
        if count is None:
            if labels is not None:
                raise ValueError(
                    "class_labels: the model has no classes; expected none (to train with classes, use --class_column)"
                )
            return None
        if labels is None:
            if null is None:
                raise ValueError(f"class_labels are missing: expected {batch_size} of {names or f'0 to {count - 1}'}")
            labels = [null] * batch_size
        if isinstance(labels, str | int) or getattr(labels, "ndim", 1) != 1:
            raise ValueError(f"class_labels={one_line(repr(labels))}: expected a list of {batch_size}")
        if not isinstance(labels, Tensor):
            labels = [label.item() if isinstance(label, np.generic) else label for label in labels]
            for label in labels:
                if label not in names and type(label) is not int:
                    raise ValueError(
                        f"class_labels: unknown class {label!r}; expected one of {names or f'0 to {count - 1}'}"
                    )
            labels = torch.tensor([names.index(label) if label in names else int(label) for label in labels])
        is_index = labels.dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
        if len(labels) != batch_size or not is_index or not bool(((labels >= 0) & (labels < count)).all()):
            raise ValueError(f"class_labels={labels.tolist()}: expected {batch_size} integers from 0 to {count - 1}")
        return labels.to(self._execution_device, torch.int64)

    def _walk(
        self,
        x_t: Tensor,
        timesteps: Tensor,
        step: Callable[[Tensor, Tensor, Tensor], Any],
        classes: Tensor | None,
        guidance_scale: float,
        callback: StepCallback | None = None,
        tensor_inputs: Sequence[str] = ("latents",),
    ) -> Tensor:
        """Call `step(prediction, t, x_t)` at each of the timesteps and return the last result."""
        unet, was_training = self.unet, self.unet.training
        dtype = unet.dtype  # once, not per step: diffusers iterates over the weights
        takes_variance = isinstance(self.scheduler, DDPMScheduler | diffusers.DDPMScheduler)
        self._num_timesteps = len(timesteps)
        sums = []

        try:
            unet.eval()  # disable dropout
            for i, t in enumerate(self.progress_bar(timesteps)):
                x_in = self.scheduler.scale_model_input(x_t, t).to(dtype)
                # torch.full on the device avoids a copy and a synchronization; tensors cause no recompilation.
                # The prediction is copied because a CUDA graph writes its next output to the same memory.
                timestep = torch.full((1,), t.item(), dtype=t.dtype, device=x_t.device)
                prediction = self.predict(x_in, timestep, classes, guidance_scale).to(torch.float32, copy=True)
                sums.append(prediction.sum())
                if not takes_variance:
                    prediction, _ = split_output(prediction, x_t.shape[1])
                output = step(prediction, t, x_t)
                x_t = output.prev_sample
                if callback is not None:
                    x_start = getattr(output, "pred_original_sample", None)
                    tensors = {"latents": x_t, "pred_original_sample": x_start, "model_output": prediction}
                    selected = {name: tensors[name] for name in tensor_inputs}
                    x_t = (callback(self, i, t, selected) or {}).get("latents", x_t)
            self._check_finite([*sums, x_t.sum()])
        finally:
            unet.train(was_training)
            self.maybe_free_model_hooks()
        return x_t

    def predict(self, x_t: Tensor, t: Tensor, classes: Tensor | None = None, guidance_scale: float = 1.0) -> Tensor:
        """Return the network's output with classifier-free guidance.

        Args:
            x_t: Diffused images, shape `(B, C, H, W)`, in the dtype of the network.
            t: Timesteps, shape `(B,)`, or shape `(1,)` for the same timestep for all images.
            classes: Class indices, int64, shape `(B,)`; None for an unconditional network.
            guidance_scale: See `__call__`.

        Returns:
            The output, shape `(B, C, H, W)`, or `(B, 2C, H, W)` with a learned variance, to which no guidance applies.
        """
        if guidance_scale == 1:
            return self.unet(x_t, t, class_labels=classes).sample
        assert classes is not None and self.null_class is not None
        both = torch.cat([classes, torch.full_like(classes, self.null_class)])
        timesteps = t if len(t) == 1 else torch.cat([t, t])
        conditional, unconditional = self.unet(torch.cat([x_t, x_t]), timesteps, class_labels=both).sample.chunk(2)
        channels = x_t.shape[1]
        guided = unconditional + guidance_scale * (conditional - unconditional)
        return torch.cat([guided[:, :channels], conditional[:, channels:]], dim=1)

    def _step_options(self, generator: Generators, eta: float) -> dict[str, Any]:
        """Return the arguments `generator` and `eta` as far as the scheduler's `step` accepts them."""
        accepted = inspect.signature(self.scheduler.step).parameters
        if eta and "eta" not in accepted:
            raise ValueError(f"eta={eta}: not supported by {type(self.scheduler).__name__}; use a DDIMScheduler")
        return {name: value for name, value in {"generator": generator, "eta": eta}.items() if name in accepted}


@cache
def warn_once(text: str) -> None:
    """Log a warning, only once per process: images are sampled in many batches."""
    logger.warning(text)


def stored_class(component: Any) -> str:
    """Return the class name under which a network or scheduler is saved."""
    kind = type(component)
    learned = kind is DDPMScheduler and component.config.variance_type == "learned"
    return f"HF{kind.__name__}" if learned or kind is DDIMScheduler else kind.__name__


def _check_index(index: Any) -> None:
    """Raise a `ValueError` with key and value if a pipeline's index has an invalid entry."""
    if not isinstance(index, dict):
        raise ValueError("not a JSON object")
    for name in ("unet", "scheduler"):
        if not conforms(index.get(name), tuple[str, str]):
            raise ValueError(f"{name}={index.get(name)!r}: expected a list with the names of a library and a class")
    labels = index.get("id2label")
    if labels is not None and not conforms(labels, dict[str, str]):
        raise ValueError(f"id2label={labels!r}: expected an object with text values")
    steps = index.get("num_inference_steps")
    if steps is not None and (type(steps) is not int or steps < 1):
        raise ValueError(f"num_inference_steps={steps!r}: expected a whole number of at least 1")
    missing = [str(i) for i in range(len(labels or ())) if str(i) not in labels]
    if missing:
        raise ValueError(f"id2label={labels!r}: class {missing[0]} is missing")
