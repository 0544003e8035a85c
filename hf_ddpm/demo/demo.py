"""Requests to a demo: check the input, sample or interpolate."""

import copy
import io
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
from hf_ddpm.images import to_bytes, to_signed
from hf_ddpm.models.precision import autocast
from hf_ddpm.pipelines.pipeline_ddpm import DDPMPipeline
from hf_ddpm.sampling.generate import generate_images
from hf_ddpm.sampling.options import Sampling
from hf_ddpm.sampling.samplers import find_scheduler
from hf_ddpm.utils.markdown import escape
from hf_ddpm.utils.seeds import FIGURES, generator

# Pixels sampled at a time, which bounds memory: 64 images of 64x64, 4 of 256x256.
PIXELS = 64 * 64 * 64
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
    """

    pipe: DDPMPipeline
    name: str
    url: str | None = None
    background: str = "white"
    precision: str = "no"

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
        channels, height, width = self.pipe.image_shape
        if path is None:
            raise ValueError(f"{name} is missing: upload an image")
        row = {"bytes": _checked_upload(name, Path(path)), "path": None}
        pixels = attempt(row, ImageFormat(height, width, channels, background=self.background))
        if isinstance(pixels, str):
            raise ValueError(f"{name}: {pixels}")
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
            with autocast(own.device, sampling.mixed_precision):
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
