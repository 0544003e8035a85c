"""Requests to a demo: check the input, sample, interpolate or inpaint."""

import copy
import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hf_ddpm.data.decoding import attempt
from hf_ddpm.data.transforms import ImageFormat
from hf_ddpm.demo.preview import Moment, watch
from hf_ddpm.images import to_bytes, to_signed
from hf_ddpm.pipelines.pipeline_ddpm import DDPMPipeline
from hf_ddpm.sampling.generate import generate_images, in_precision
from hf_ddpm.sampling.options import Sampling
from hf_ddpm.sampling.samplers import find_scheduler
from hf_ddpm.utils.files import one_line
from hf_ddpm.utils.markdown import escape
from hf_ddpm.utils.seeds import FIGURES, SAMPLES, generator

# Pixels sampled at a time, which bounds memory: 64 images of 64x64, 4 of 256x256.
PIXELS = 64 * 64 * 64
# Of each part of the process, in inpainting.
MOST_PASSES = 20
# Of an uploaded image: more than of cameras, and few enough to decode.
UPLOADED_PIXELS = 50_000_000
# Formats that PIL decodes by itself; EPS, for one, would be handed to Ghostscript.
UPLOADED_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")


@dataclass
class Demo:
    """A model that serves several requests at once; wrong input raises a `ValueError` of one line.

    Attributes:
        pipe: The pipeline.
        name: Name of the model.
        url: Address of the model's page, if it has one.
        background: Color behind transparent pixels of uploaded images, unless the model has 4 channels.
        precision: Precision of the network's passes: `no`, `bf16` or `fp16`.
        distilled: A model distilled from this one, which samples the same noise in a few steps; None for none.
    """

    pipe: DDPMPipeline
    name: str
    url: str | None = None
    background: str = "white"
    precision: str = "no"
    distilled: DDPMPipeline | None = None

    @property
    def num_train_timesteps(self) -> int:
        """The number `T` of steps that the network was trained for."""
        return self.pipe.scheduler.config.num_train_timesteps

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of an image."""
        _, height, width = self.pipe.image_shape
        return width, height

    @property
    def most_images(self) -> int:
        """Largest number of images per request, 2 to 64: fewer if they are large."""
        width, height = self.size
        return max(2, min(64, PIXELS // (width * height)))

    @property
    def classes(self) -> list[str]:
        """The classes to choose from: names, or else numbers; empty for a network without classes."""
        return self.pipe.class_names or [str(number) for number in range(self.pipe.unet.config.num_class_embeds or 0)]

    @property
    def usual_images(self) -> int:
        """Number of images unless another one is requested: a quarter of the largest, 1 to 16."""
        return min(16, max(1, self.most_images // 4))

    @property
    def usual(self) -> Sampling:
        """The default request: at most 50 steps, or those of a distilled model; the first class if one is required."""
        is_required = self.pipe.null_class is None
        return self.read(0, min(50, self.pipe.default_steps), "ddpm", self.classes[:1] if is_required else [])

    def describe(self) -> str:
        """Return a line of Markdown on the model, with a link to its page."""
        channels, height, width = self.pipe.image_shape
        colors = {1: "gray", 3: "RGB", 4: "RGBA"}.get(channels, f"{channels} channels")
        name = f"**{escape(self.name)}**"
        device = "a GPU" if self.pipe.device.type == "cuda" else "a CPU"
        precision = "" if self.precision == "no" else f" in {self.precision}"
        facts = [
            name if self.url is None else f"[{name}]({self.url})",
            f"{self.pipe.unet.num_parameters():,} parameters",
            f"{height}x{width} pixels, {colors}",
            f"trained with {self.num_train_timesteps:,} steps",
            f"runs on {device}{precision}",
        ]
        return " · ".join(facts)

    def read(
        self, seed: float, steps: float, scheduler: str, classes: Sequence[str] = (), guidance: float = 1.0
    ) -> Sampling:
        """Return the requested images as a `Sampling`."""
        return Sampling(
            whole("seed", seed, 0, 2**53),  # up to here a browser's numbers are exact
            whole("steps", steps, 1, self.num_train_timesteps),
            scheduler,
            class_labels=list(classes),
            guidance_scale=guidance,
            mixed_precision=self.precision,
        )

    def read_image(self, name: str, path: str | None) -> Tensor:
        """Return an image file, resized as for training, as bytes of shape `(1, C, H, W)`."""
        if path is None:
            raise ValueError(f"{name} is missing: upload an image")
        return self._fitted(name, Path(path).read_bytes(), self.pipe.image_shape[0]).unsqueeze(0)

    def read_drawing(self, image: bytes | None, layers: Sequence[bytes]) -> tuple[Tensor, Tensor]:
        """Return an image and the part of it that is painted over, resized as for training.

        Args:
            image: Content of an image file.
            layers: Contents of image files of the same size, transparent where nothing is painted.

        Returns:
            The image, bytes, shape `(1, C, H, W)`, and a mask, bool, shape `(H, W)`: pixels that are covered by at
            least a quarter.

        Raises:
            ValueError: If there is no image, a file cannot be used, or nothing is painted.
        """
        if image is None:
            raise ValueError("image is missing: upload one, or sample one")
        pixels = self._fitted("image", self._reduced("image", image), self.pipe.image_shape[0]).unsqueeze(0)
        is_painted = torch.zeros(self.pipe.image_shape[1:], dtype=torch.bool)
        for layer in layers:
            is_painted |= self._fitted("layer", self._reduced("layer", layer, "A"), 1)[0] >= 64
        if not bool(is_painted.any()):
            raise ValueError("nothing is painted: paint over the part to fill")
        return pixels, is_painted

    def generate(self, sampling: Sampling, count: float) -> Iterator[Moment]:
        """Generate the first images of a `Sampling`, the same as those of `hf-ddpm sample`.

        Args:
            sampling: Seed, steps, sampler and classes.
            count: Number of images, in [1, `most_images`].

        Returns:
            Moments, see `watch`.
        """
        return self._generate(self._own_pipeline(), sampling, count)

    def shortcut(self, sampling: Sampling, count: float) -> Moment | None:
        """Generate the images of the distilled model from the same noise, in its own steps; None without one.

        The guidance is part of that model.
        """
        if self.distilled is None:
            return None
        own = self.distilled
        few = replace(sampling, scheduler="ddpm", num_inference_steps=own.default_steps, guidance_scale=1.0)
        *_, moment = self._generate(_copied(own), few, count)
        return moment

    def interpolate(
        self, first: Tensor, second: Tensor, t: float, count: float, sampling: Sampling
    ) -> Iterator[Moment]:
        """Interpolate between two images (Section 4.4).

        Args:
            first: An image, bytes, shape `(1, C, H, W)`.
            second: Another one.
            t: Step that both are diffused to, in [0, T).
            count: Number of images, from a reconstruction of the first to one of the second, in [2, `most_images`].
            sampling: Seed of the noise; the class, its first one; sampler and steps of the way back, at most `t + 1`.

        Returns:
            Moments, see `watch`.
        """
        t = whole("t", t, 0, self.num_train_timesteps - 1)
        weights = np.linspace(0, 1, whole("count", count, 2, self.most_images)).tolist()
        own = self._own_pipeline()
        steps = min(sampling.steps(own), t + 1)
        is_whole = steps == t + 1  # in single steps, as in sampling with all of them
        own.scheduler = find_scheduler(own, sampling.scheduler, self.num_train_timesteps if is_whole else steps)

        def work(**options: Any) -> Tensor:
            with in_precision(own, sampling.mixed_precision):
                unit = own.interpolate(
                    to_signed(first),
                    to_signed(second),
                    t,
                    weights,
                    generator(sampling.seed, FIGURES, device=own.device),
                    output_type="pt",
                    num_inference_steps=steps,
                    class_labels=sampling.labels(own)[:1] * len(weights) or None,
                    guidance_scale=sampling.guidance_scale,
                    **options,
                )
            return to_bytes(unit).cpu()

        return watch(work)

    def inpaint(self, image: Tensor, mask: Tensor, count: float, passes: float, sampling: Sampling) -> Iterator[Moment]:
        """Fill a part of an image several times, by RePaint.

        Args:
            image: The image, bytes, shape `(1, C, H, W)`.
            mask: True where to fill, shape `(H, W)`.
            count: Number of fills, in [1, `most_images`].
            passes: How often each part of the process is walked, in [1, `MOST_PASSES`].
            sampling: Seed, steps and classes.

        Returns:
            Moments, see `watch`.
        """
        fills, walked = whole("count", count, 1, self.most_images), whole("passes", passes, 1, MOST_PASSES)
        own, labels = self._own_pipeline(), sampling.labels(self.pipe)
        steps = sampling.steps(own)
        own.scheduler = find_scheduler(own, "ddpm", steps)

        def work(**options: Any) -> Tensor:
            with in_precision(own, sampling.mixed_precision):
                unit = own.inpaint(
                    to_signed(image).expand(fills, -1, -1, -1),
                    mask,
                    [generator(sampling.seed, SAMPLES, i, device=own.device) for i in range(fills)],
                    steps,
                    jump_length=max(1, min(10, steps // 5)),
                    jump_n_sample=walked,
                    class_labels=[labels[i % len(labels)] for i in range(fills)] if labels else None,
                    guidance_scale=sampling.guidance_scale,
                    output_type="pt",
                    **options,
                ).images
            return to_bytes(unit).cpu()

        return watch(work)

    def _reduced(self, name: str, content: bytes, channel: str | None = None) -> bytes:
        """Return an image file, or one channel, as PNG; one enlarged by a whole number has its pixels back exactly."""
        width, height = self.size
        checked = _checked_upload(name, content)
        try:
            with Image.open(io.BytesIO(checked)) as opened, io.BytesIO() as file:
                image = opened.convert("RGBA")
                factor = image.width // width
                if factor > 0 and image.size == (factor * width, factor * height):
                    image = image.reduce(factor)
                (image if channel is None else image.getchannel(channel)).save(file, format="PNG")
                return file.getvalue()
        except Exception as error:  # decoders raise anything
            raise ValueError(f"{name}: {one_line(error)}") from error

    def _fitted(self, name: str, content: bytes, channels: int) -> Tensor:
        """Return an image file, resized as for training, as bytes of shape `(channels, H, W)`."""
        _, height, width = self.pipe.image_shape
        row = {"bytes": _checked_upload(name, content), "path": None}
        pixels = attempt(row, ImageFormat(height, width, channels, background=self.background))
        if isinstance(pixels, str):
            raise ValueError(f"{name}: {pixels}")
        return torch.tensor(pixels)

    def _generate(self, own: DDPMPipeline, sampling: Sampling, count: float) -> Iterator[Moment]:
        numbers = range(whole("count", count, 1, self.most_images))

        def work(**options: Any) -> Tensor:
            images = generate_images(own, numbers, sampling, batch_size=len(numbers), device=own.device, **options)
            return torch.stack([image for _, image in images])

        return watch(work)

    def _own_pipeline(self) -> DDPMPipeline:
        return _copied(self.pipe)


def _copied(pipe: DDPMPipeline) -> DDPMPipeline:
    """Return a pipeline of the same network with a scheduler of its own."""
    own = DDPMPipeline(pipe.unet, copy.deepcopy(pipe.scheduler), pipe.config.get("id2label"))
    own.set_progress_bar_config(disable=True)
    return own


def _checked_upload(name: str, content: bytes) -> bytes:
    """Return the content of an image file, after its header was checked for a safe format and size."""
    Image.init()
    formats = [known for known in UPLOADED_FORMATS if known in Image.OPEN]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound below is tighter
            width, height = Image.open(io.BytesIO(content), formats=formats).size  # reads only the header
    except Image.DecompressionBombError:
        raise ValueError(f"{name}: too many pixels; expected at most {UPLOADED_PIXELS:,}") from None
    except Exception as error:  # decoders raise anything
        raise ValueError(f"{name}: unknown image format; expected one of {', '.join(formats)}") from error
    if width * height > UPLOADED_PIXELS:
        raise ValueError(f"{name}: {width}x{height} pixels are too many; expected at most {UPLOADED_PIXELS:,}")
    return content


def whole(name: str, value: Any, least: int, most: int) -> int:
    """Return a number as an integer; raise a `ValueError` unless it is whole, from `least` to `most`."""
    if not isinstance(value, int | float) or not float(value).is_integer() or not least <= value <= most:
        typed = f"{value:.15g}" if isinstance(value, float) else repr(value)
        raise ValueError(f"{name}={typed}: expected a whole number from {least} to {most}")
    return int(value)
