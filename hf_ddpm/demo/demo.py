"""What a demo of a model answers: what was typed, checked, and images to look at."""

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
from hf_ddpm.pipelines.pipeline_ddpm import DDPMPipeline
from hf_ddpm.sampling.generate import sample_images
from hf_ddpm.sampling.options import Sampling
from hf_ddpm.utils.markdown import escape
from hf_ddpm.utils.seeds import FIGURES, generator

# Pixels that are made at a time, which bounds memory: 64 images of 64x64, 4 of 256x256.
PIXELS = 64 * 64 * 64
# Images whose way is shown.
ROWS = 4
# Of an uploaded image: more than cameras make, and little enough to decode.
UPLOADED_PIXELS = 50_000_000
# Formats that PIL decodes by itself; EPS, for one, would be handed to Ghostscript.
UPLOADED_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")


@dataclass
class Demo:
    """A model that several people may ask at once. What they typed wrong raises a `ValueError` of one line.

    Attributes:
        pipe: The pipeline.
        name: What the model is called.
    """

    pipe: DDPMPipeline
    name: str

    @property
    def num_train_timesteps(self) -> int:
        """The number `T` of steps that the network was trained for."""
        return self.pipe.scheduler.config.num_train_timesteps

    @property
    def most_images(self) -> int:
        """How many images are made at a time, 2 to 64: fewer if they are large."""
        _, height, width = self.pipe.image_shape
        return max(2, min(64, PIXELS // (height * width)))

    @property
    def classes(self) -> list[str]:
        """The classes that can be asked for: names, or else numbers; none if the network knows none."""
        return self.pipe.class_names or [str(number) for number in range(self.pipe.unet.config.num_class_embeds or 0)]

    def describe(self) -> str:
        """Returns what there is to know of the model, in a line of Markdown."""
        channels, height, width = self.pipe.image_shape
        facts = [
            f"**{escape(self.name)}**",
            f"{self.pipe.unet.num_parameters():,} parameters",
            f"{height}x{width} pixels of {channels} channel{'s' * (channels > 1)}",
            f"{type(self.pipe.scheduler).__name__}, T = {self.num_train_timesteps}",
            f"at most {self.most_images} images at a time, on {self.pipe.device.type}",
        ]
        return " · ".join(facts)

    def read(
        self, seed: float, steps: float, scheduler: str, classes: Sequence[str] = (), guidance: float = 1.0
    ) -> Sampling:
        """Returns which images were asked for."""
        return Sampling(
            whole("seed", seed, 0, 2**53),  # up to here a browser's numbers are exact
            whole("steps", steps, 1, self.num_train_timesteps),
            scheduler,
            class_labels=list(classes),
            guidance_scale=guidance,
        )

    def read_image(self, name: str, path: str | None) -> Tensor:
        """Returns an image file, fitted as images are for training, as bytes of shape `(1, C, H, W)`."""
        channels, height, width = self.pipe.image_shape
        row = {"bytes": None if path is None else _checked_upload(name, Path(path)), "path": None}
        pixels = attempt(row, ImageFormat(height, width, channels))
        if isinstance(pixels, str):
            raise ValueError(f"{name} is not usable: {pixels}")
        return torch.tensor(pixels).unsqueeze(0)

    def generate(self, sampling: Sampling, count: float) -> Iterator[Moment]:
        """Generates the first images of a `Sampling`, in view: the same as those of `scripts/sample.py`.

        Args:
            sampling: Which images.
            count: How many, in [1, `most_images`].

        Returns:
            Moments, see `watch`.
        """
        numbers = range(whole("count", count, 1, self.most_images))
        own = self._own_pipeline()

        def work(**options: Any) -> Tensor:
            images = sample_images(own, numbers, sampling, batch_size=len(numbers), device=own.device, **options)
            return torch.stack([image for _, image in images])

        return watch(work)

    def interpolate(
        self, first: Tensor, second: Tensor, t: float, count: float, sampling: Sampling
    ) -> Iterator[Moment]:
        """Generates what lies between two images (Section 4.4), in view.

        Args:
            first: An image, bytes, shape `(1, C, H, W)`.
            second: Another one.
            t: How far both are diffused, in [0, T).
            count: How many images, from a reconstruction of the first to one of the second, in [2, `most_images`].
            sampling: Which noise, by its seed, and which class, the first it names.

        Returns:
            Moments, see `watch`.
        """
        t = whole("t", t, 0, self.num_train_timesteps - 1)
        weights = np.linspace(0, 1, whole("count", count, 2, self.most_images)).tolist()
        own = self._own_pipeline()

        def work(**options: Any) -> Tensor:
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
        """Returns a pipeline of the same network, whose scheduler no other request sets."""
        own = DDPMPipeline(self.pipe.unet, copy.deepcopy(self.pipe.scheduler), self.pipe.config.get("id2label"))
        own.set_progress_bar_config(disable=True)
        return own


def _checked_upload(name: str, path: Path) -> bytes:
    """Returns the bytes of an image file whose header promises a safe format and size."""
    content = path.read_bytes()
    Image.init()
    formats = [known for known in UPLOADED_FORMATS if known in Image.OPEN]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound below is tighter
            width, height = Image.open(io.BytesIO(content), formats=formats).size  # reads the header alone
    except Image.DecompressionBombError:
        raise ValueError(f"{name} is not usable: it has too many pixels; at most {UPLOADED_PIXELS:,}") from None
    except Exception as error:  # decoders raise anything
        raise ValueError(f"{name} is not usable: it is no image of a known format ({', '.join(formats)})") from error
    if width * height > UPLOADED_PIXELS:
        raise ValueError(f"{name} is not usable: {width}x{height} pixels are too many; at most {UPLOADED_PIXELS:,}")
    return content


def whole(name: str, value: Any, least: int, most: int) -> int:
    """Returns a number that was typed as an integer; any but those from `least` to `most` raises a `ValueError`."""
    if not isinstance(value, int | float) or not float(value).is_integer() or not least <= value <= most:
        typed = f"{value:.15g}" if isinstance(value, float) else repr(value)
        raise ValueError(f"{name}={typed} is not allowed: a whole number from {least} to {most}")
    return int(value)


def square(images: Tensor) -> Image.Image:
    """Tiles bytes."""
    return _tiled(images, math.ceil(math.sqrt(len(images))), width=512)


def row(*images: Tensor) -> Image.Image:
    """Lays bytes, one batch after the other, side by side."""
    return _tiled(torch.cat(images), sum(map(len, images)), width=1024)


def strip(moment: Moment) -> Image.Image:
    """Draws the frames of the first images, one row an image; those to come are black."""
    frames = [frame[:ROWS] for frame in moment.frames]
    frames += [torch.zeros_like(frames[0])] * moment.frames_to_come
    return _tiled(torch.stack(frames, dim=1).flatten(0, 1), len(frames), width=1024)


def _tiled(images: Tensor, columns: int, width: int) -> Image.Image:
    """Tiles bytes, enlarged pixel by pixel as far as they fit into a width."""
    pictures = to_pictures(images)
    return grid(pictures, columns, scale=max(1, width // (columns * pictures[0].width)))
