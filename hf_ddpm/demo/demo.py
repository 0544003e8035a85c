"""Requests to a demo: check the input, sample or interpolate, lay out the images."""

import copy
import io
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hf_ddpm.data.decoding import attempt
from hf_ddpm.data.transforms import ImageFormat
from hf_ddpm.demo.preview import Moment, watch
from hf_ddpm.images import grid, to_bytes, to_pictures, to_signed
from hf_ddpm.models.precision import PRECISION_NAMES, autocast
from hf_ddpm.pipelines.pipeline_ddpm import DDPMPipeline
from hf_ddpm.sampling.generate import generate_images
from hf_ddpm.sampling.options import Sampling
from hf_ddpm.utils.markdown import escape
from hf_ddpm.utils.seeds import FIGURES, generator

# Pixels sampled at a time, which bounds memory: 64 images of 64x64, 4 of 256x256.
PIXELS = 64 * 64 * 64
# Images whose estimates are shown during sampling.
ROWS = 4
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
        precision: Precision of the network's passes: `no`, `bf16` or `fp16`.
    """

    pipe: DDPMPipeline
    name: str
    precision: str = "no"

    @property
    def num_train_timesteps(self) -> int:
        """The number `T` of steps that the network was trained for."""
        return self.pipe.scheduler.config.num_train_timesteps

    @property
    def most_images(self) -> int:
        """Largest number of images per request, 2 to 64: fewer if they are large."""
        _, height, width = self.pipe.image_shape
        return max(2, min(64, PIXELS // (height * width)))

    @property
    def classes(self) -> list[str]:
        """The classes to choose from: names, or else numbers; empty for a network without classes."""
        return self.pipe.class_names or [str(number) for number in range(self.pipe.unet.config.num_class_embeds or 0)]

    def describe(self) -> str:
        """Return a line of Markdown on the model."""
        channels, height, width = self.pipe.image_shape
        device = f"{self.pipe.device.type}, {PRECISION_NAMES[self.precision]}"
        facts = [
            f"**{escape(self.name)}**",
            f"{self.pipe.unet.num_parameters():,} parameters",
            f"{height}x{width} pixels of {channels} channel{'s' * (channels > 1)}",
            f"{type(self.pipe.scheduler).__name__}, T = {self.num_train_timesteps}",
            f"at most {self.most_images} images at a time, on {device}",
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
        channels, height, width = self.pipe.image_shape
        row = {"bytes": None if path is None else _checked_upload(name, Path(path)), "path": None}
        pixels = attempt(row, ImageFormat(height, width, channels))
        if isinstance(pixels, str):
            raise ValueError(f"{name} is not usable: {pixels}")
        return torch.tensor(pixels).unsqueeze(0)

    def generate(self, sampling: Sampling, count: float) -> Iterator[Moment]:
        """Generate the first images of a `Sampling`, the same as those of `hf-ddpm sample`.

        Args:
            sampling: Seed, steps, sampler and classes.
            count: Number of images, in [1, `most_images`].

        Returns:
            Moments, see `watch`.
        """
        numbers = range(whole("count", count, 1, self.most_images))
        own = self._own_pipeline()

        def work(**options: Any) -> Tensor:
            images = generate_images(own, numbers, sampling, batch_size=len(numbers), device=own.device, **options)
            return torch.stack([image for _, image in images])

        return watch(work)

    def interpolate(
        self, first: Tensor, second: Tensor, t: float, count: float, sampling: Sampling
    ) -> Iterator[Moment]:
        """Interpolate between two images (Section 4.4).

        Args:
            first: An image, bytes, shape `(1, C, H, W)`.
            second: Another one.
            t: Step that both are diffused to, in [0, T).
            count: Number of images, from a reconstruction of the first to one of the second, in [2, `most_images`].
            sampling: Seed of the noise, and the class, its first one.

        Returns:
            Moments, see `watch`.
        """
        t = whole("t", t, 0, self.num_train_timesteps - 1)
        weights = np.linspace(0, 1, whole("count", count, 2, self.most_images)).tolist()
        own = self._own_pipeline()

        def work(**options: Any) -> Tensor:
            with autocast(own.device, sampling.mixed_precision):
                unit = own.interpolate(
                    to_signed(first),
                    to_signed(second),
                    t,
                    weights,
                    generator(sampling.seed, FIGURES, device=own.device),
                    output_type="pt",
                    class_labels=sampling.labels(own)[:1] * len(weights) or None,
                    guidance_scale=sampling.guidance_scale,
                    **options,
                )
            return to_bytes(unit).cpu()

        return watch(work)

    def _own_pipeline(self) -> DDPMPipeline:
        """Return a pipeline of the same network with a scheduler of its own."""
        own = DDPMPipeline(self.pipe.unet, copy.deepcopy(self.pipe.scheduler), self.pipe.config.get("id2label"))
        own.set_progress_bar_config(disable=True)
        return own


def _checked_upload(name: str, path: Path) -> bytes:
    """Return the bytes of an image file, after its header was checked for a safe format and size."""
    content = path.read_bytes()
    Image.init()
    formats = [known for known in UPLOADED_FORMATS if known in Image.OPEN]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound below is tighter
            width, height = Image.open(io.BytesIO(content), formats=formats).size  # reads only the header
    except Image.DecompressionBombError:
        raise ValueError(f"{name} is not usable: it has too many pixels; at most {UPLOADED_PIXELS:,}") from None
    except Exception as error:  # decoders raise anything
        raise ValueError(f"{name} is not usable: it is no image of a known format ({', '.join(formats)})") from error
    if width * height > UPLOADED_PIXELS:
        raise ValueError(f"{name} is not usable: {width}x{height} pixels are too many; at most {UPLOADED_PIXELS:,}")
    return content


def whole(name: str, value: Any, least: int, most: int) -> int:
    """Return a number as an integer; raise a `ValueError` unless it is whole, from `least` to `most`."""
    if not isinstance(value, int | float) or not float(value).is_integer() or not least <= value <= most:
        typed = f"{value:.15g}" if isinstance(value, float) else repr(value)
        raise ValueError(f"{name}={typed} is not allowed: a whole number from {least} to {most}")
    return int(value)


def square(images: Tensor) -> Image.Image:
    """Tile images, bytes, in a square."""
    return _tiled(images, math.ceil(math.sqrt(len(images))), width=512)


def row(*images: Tensor) -> Image.Image:
    """Lay batches of bytes side by side."""
    return _tiled(torch.cat(images), sum(map(len, images)), width=1024)


def strip(moment: Moment) -> Image.Image:
    """Draw the frames of the first images, one row per image; those to come are black."""
    frames = [frame[:ROWS] for frame in moment.frames]
    frames += [torch.zeros_like(frames[0])] * moment.frames_to_come
    return _tiled(torch.stack(frames, dim=1).flatten(0, 1), len(frames), width=1024)


def _tiled(images: Tensor, columns: int, width: int) -> Image.Image:
    """Tile bytes, enlarged pixel by pixel as far as they fit into a width."""
    pictures = to_pictures(images)
    return grid(pictures, columns, scale=max(1, width // (columns * pictures[0].width)))
