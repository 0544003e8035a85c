"""Requests of the demo: check the input; sample, interpolate or inpaint."""

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
from hf_ddpm.demo.preview import PreviewFrame, watch
from hf_ddpm.images import to_bytes, to_signed
from hf_ddpm.pipelines.pipeline_ddpm import DDPMPipeline
from hf_ddpm.sampling.generate import generate_images, in_precision
from hf_ddpm.sampling.options import Sampling
from hf_ddpm.sampling.samplers import find_scheduler
from hf_ddpm.utils.files import one_line
from hf_ddpm.utils.markdown import escape
from hf_ddpm.utils.seeds import FIGURES, SAMPLES, generator

# Maximum number of pixels per request, to limit memory: 64 images of 64x64, or 4 of 256x256.
MAX_PIXELS = 64 * 64 * 64
# Maximum number of repeats of each part of the process by RePaint.
MAX_REPEATS = 20
# Guidance scale of the first view, as in model cards.
GUIDANCE = 2.0
# Maximum number of pixels of an uploaded image: more than a camera has, and few enough to decode.
MAX_UPLOADED_PIXELS = 50_000_000
# Formats that PIL decodes without external programs (it runs Ghostscript for EPS).
UPLOADED_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")


@dataclass
class Demo:
    """A model that serves concurrent requests; invalid input raises a `ValueError` of one line.

    Attributes:
        pipe: The pipeline.
        name: Name of the model.
        url: URL of the model's page, if it has one.
        background: Color behind transparent pixels of uploaded images, unless the model has 4 channels.
        precision: Precision of the network's forward passes: `no`, `bf16` or `fp16`.
        distilled: A model distilled from this one, which samples from the same noise in few steps, if any.
    """

    pipe: DDPMPipeline
    name: str
    url: str | None = None
    background: str = "white"
    precision: str = "no"
    distilled: DDPMPipeline | None = None

    @property
    def num_train_timesteps(self) -> int:
        """The number `T` of training timesteps."""
        return self.pipe.scheduler.config.num_train_timesteps

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of an image."""
        _, height, width = self.pipe.image_shape
        return width, height

    @property
    def max_images(self) -> int:
        """Maximum number of images per request, 2 to 64, depending on their size."""
        width, height = self.size
        return max(2, min(64, MAX_PIXELS // (width * height)))

    @property
    def classes(self) -> list[str]:
        """The names of the classes, or their indices if they have no names; empty for a model without classes."""
        return self.pipe.class_names or [str(index) for index in range(self.pipe.unet.config.num_class_embeds or 0)]

    @property
    def default_images(self) -> int:
        """Default number of images: a quarter of `max_images`, limited to 1 to 16."""
        return min(16, max(1, self.max_images // 4))

    @property
    def default_request(self) -> Sampling:
        """The request of the first view: at most 50 steps; up to four classes in turn, with guidance if supported."""
        steps = min(50, self.pipe.default_steps)
        return self.read(0, steps, "ddpm", self.classes[:4], GUIDANCE if self.pipe.is_guided else 1.0)

    @property
    def required_class(self) -> list[str]:
        """The first class, if every request needs a class."""
        return self.classes[:1] if self.pipe.null_class is None else []

    def describe(self) -> str:
        """Return a line of Markdown that describes the model, with a link to its page."""
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
        """Return the `Sampling` of a request."""
        return Sampling(
            whole_number("seed", seed, 0, 2**53),  # larger integers are not exact in a browser
            whole_number("steps", steps, 1, self.num_train_timesteps),
            scheduler,
            class_labels=list(classes),
            guidance_scale=guidance,
            mixed_precision=self.precision,
        )

    def read_image(self, name: str, path: str | None) -> Tensor:
        """Return an image file, resized as for training, as uint8 of shape `(1, C, H, W)`."""
        if path is None:
            raise ValueError(f"{name} is missing: upload an image")
        return self._fitted(name, Path(path).read_bytes(), self.pipe.image_shape[0]).unsqueeze(0)

    def read_drawing(self, image: bytes | None, layers: Sequence[bytes]) -> tuple[Tensor, Tensor]:
        """Return the image and the mask of a drawing, both resized as for training.

        Args:
            image: Content of an image file.
            layers: Contents of image files of the same size, transparent where nothing is painted.

        Returns:
            The image, uint8, shape `(1, C, H, W)`, and a mask, bool, shape `(H, W)`, which is True for pixels of which
            at least a quarter is painted.

        Raises:
            ValueError: If the image is missing, a file is unusable, or nothing is painted.
        """
        if image is None:
            raise ValueError("image is missing: upload or sample an image")
        pixels = self._fitted("image", self._reduced("image", image), self.pipe.image_shape[0]).unsqueeze(0)
        is_painted = torch.zeros(self.pipe.image_shape[1:], dtype=torch.bool)
        for layer in layers:
            is_painted |= self._fitted("layer", self._reduced("layer", layer, "A"), 1)[0] >= 64
        if not bool(is_painted.any()):
            raise ValueError("nothing is painted: paint over the area to fill")
        return pixels, is_painted

    def generate(self, sampling: Sampling, count: float) -> Iterator[PreviewFrame]:
        """Generate the first images of a `Sampling`, equal to the images of `hf-ddpm sample`.

        Args:
            sampling: Seed, steps, sampler and classes.
            count: Number of images, in [1, `max_images`].

        Returns:
            Moments, see `watch`.
        """
        return self._generate(self._own_pipeline(), sampling, count)

    def generate_distilled(self, sampling: Sampling, count: float) -> PreviewFrame | None:
        """Generate images of the distilled model from the same noise, in its own number of steps.

        The guidance scale is ignored, since guidance is built into the distilled model.

        Returns:
            The final images, or None without a distilled model.
        """
        if self.distilled is None:
            return None
        steps = self.distilled.default_steps
        request = replace(sampling, scheduler="ddpm", num_inference_steps=steps, guidance_scale=1.0)
        *_, preview = self._generate(_with_own_scheduler(self.distilled), request, count)
        return preview

    def interpolate(
        self, first: Tensor, second: Tensor, t: float, count: float, sampling: Sampling
    ) -> Iterator[PreviewFrame]:
        """Interpolate between two images (Section 4.4).

        Args:
            first: An image, uint8, shape `(1, C, H, W)`.
            second: Another image.
            t: Step up to which noise is added to both images, in [0, T).
            count: Number of images, from a reconstruction of the first to one of the second, in [2, `max_images`].
            sampling: Seed of the noise, sampler, and steps of the reverse process (at most `t + 1`). Only the first of
                its classes is used.

        Returns:
            Moments, see `watch`.
        """
        t = whole_number("t", t, 0, self.num_train_timesteps - 1)
        weights = np.linspace(0, 1, whole_number("count", count, 2, self.max_images)).tolist()
        own = self._own_pipeline()
        steps = min(sampling.steps(own), t + 1)
        takes_all_steps = steps == t + 1
        own.scheduler = find_scheduler(own, sampling.scheduler, self.num_train_timesteps if takes_all_steps else steps)

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

    def inpaint(
        self, image: Tensor, mask: Tensor, count: float, repeats: float, sampling: Sampling
    ) -> Iterator[PreviewFrame]:
        """Fill an area of an image several times, with RePaint.

        Args:
            image: The image, uint8, shape `(1, C, H, W)`.
            mask: True for pixels to fill, shape `(H, W)`.
            count: Number of results, in [1, `max_images`].
            repeats: Number of repeats of each part of the process, in [1, `MAX_REPEATS`]; 1 disables resampling.
            sampling: Seed, steps and classes.

        Returns:
            Moments, see `watch`.
        """
        fills, num_repeats = (
            whole_number("count", count, 1, self.max_images),
            whole_number("repeats", repeats, 1, MAX_REPEATS),
        )
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
                    jump_n_sample=num_repeats,
                    class_labels=[labels[i % len(labels)] for i in range(fills)] if labels else None,
                    guidance_scale=sampling.guidance_scale,
                    output_type="pt",
                    **options,
                ).images
            return to_bytes(unit).cpu()

        return watch(work)

    def _reduced(self, name: str, content: bytes, channel: str | None = None) -> bytes:
        """Return an image file, or one of its channels, as PNG; undo an enlargement by an integer factor exactly."""
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
        except Exception as error:  # decoders raise many types of errors
            raise ValueError(f"{name}: {one_line(error)}") from error

    def _fitted(self, name: str, content: bytes, channels: int) -> Tensor:
        """Return an image file, resized as for training, as uint8 of shape `(channels, H, W)`."""
        _, height, width = self.pipe.image_shape
        row = {"bytes": _checked_upload(name, content), "path": None}
        pixels = attempt(row, ImageFormat(height, width, channels, background=self.background))
        if isinstance(pixels, str):
            raise ValueError(f"{name}: {pixels}")
        return torch.tensor(pixels)

    def _generate(self, own: DDPMPipeline, sampling: Sampling, count: float) -> Iterator[PreviewFrame]:
        indices = range(whole_number("count", count, 1, self.max_images))

        def work(**options: Any) -> Tensor:
            images = generate_images(own, indices, sampling, batch_size=len(indices), device=own.device, **options)
            return torch.stack([image for _, image in images])

        return watch(work)

    def _own_pipeline(self) -> DDPMPipeline:
        return _with_own_scheduler(self.pipe)


def _with_own_scheduler(pipe: DDPMPipeline) -> DDPMPipeline:
    """Return a pipeline with the shared network and a copy of the scheduler."""
    own = DDPMPipeline(pipe.unet, copy.deepcopy(pipe.scheduler), pipe.config.get("id2label"))
    own.set_progress_bar_config(disable=True)
    return own


def _checked_upload(name: str, content: bytes) -> bytes:
    """Return the content of an image file after checking the format and size in its header."""
    Image.init()
    formats = [entry for entry in UPLOADED_FORMATS if entry in Image.OPEN]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is stricter
            width, height = Image.open(io.BytesIO(content), formats=formats).size  # reads only the header
    except Image.DecompressionBombError:
        raise ValueError(f"{name}: too many pixels; expected at most {MAX_UPLOADED_PIXELS:,}") from None
    except Exception as error:  # decoders raise many types of errors
        raise ValueError(f"{name}: unknown image format; expected one of {', '.join(formats)}") from error
    if width * height > MAX_UPLOADED_PIXELS:
        raise ValueError(f"{name}: {width}x{height} has too many pixels; expected at most {MAX_UPLOADED_PIXELS:,}")
    return content


def whole_number(name: str, value: Any, minimum: int, maximum: int) -> int:
    """Return a number as an integer; raise a `ValueError` unless it is an integer from `minimum` to `maximum`."""
    if not isinstance(value, int | float) or not float(value).is_integer() or not minimum <= value <= maximum:
        text = f"{value:.15g}" if isinstance(value, float) else repr(value)
        raise ValueError(f"{name}={text}: expected a whole number from {minimum} to {maximum}")
    return int(value)
