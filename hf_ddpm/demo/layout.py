"""Visual elements of the demo: image grid, strips of images that wrap on a phone, progress bar."""

import base64
import html
import io
import math
from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from hf_ddpm.demo.preview import PreviewFrame
from hf_ddpm.images import MOST_CLASSES, grid, to_pictures

# Small images are upscaled up to this number of pixels: in the grid, in a strip.
GRID_SIZE, TILE_SIZE = 768, 192
# Number of images in each frame of the strip.
STRIP_IMAGES = 4
# Maximum width of an image in a strip, in CSS pixels.
MAX_WIDTH = 160
# Labels and buttons would cover images: add padding above them.
CSS = """
.picture .image-container {padding-top: 2.2em}
.picture img {max-height: 26rem}
.upload img {width: 100%; height: 100%; object-fit: contain}
.buttons {gap: .5rem}
.buttons button {flex: 1 1 auto; padding-inline: .6rem; white-space: nowrap}
.strip {display: grid; grid-template-columns: repeat(auto-fit, minmax(4.4rem, 1fr)); gap: .4rem}
.frames .strip {grid-template-columns: repeat(4, 1fr)}
.strip figure {margin: 0; text-align: center; font-size: .8rem}
.strip img, .strip .blank {display: block; width: 100%; margin: 0; border-radius: 4px}
.strip .blank {background: var(--border-color-primary)}
.progress {display: flex; align-items: center; gap: .8rem; min-height: 1.5rem; white-space: nowrap}
.progress progress {flex: 1; min-width: 4rem; height: .7rem; accent-color: var(--color-accent)}
.progress progress::-webkit-progress-value {background: var(--color-accent)}
.progress progress::-moz-progress-bar {background: var(--color-accent)}
"""


def sheet(images: Tensor, classes: Sequence[str] = ()) -> Image.Image:
    """Draw images (uint8) as a grid; several classes in turn get one column each."""
    return _upscaled(images, GRID_SIZE, classes[: len(images)] if 1 < len(classes) <= MOST_CLASSES else ())


def strip(preview: PreviewFrame) -> str:
    """Return HTML of the frames of the first images; future frames are blank."""
    captions = [f"step {step}" for step in preview.frame_steps]
    frames = [_upscaled(frame[:STRIP_IMAGES], TILE_SIZE) for frame in preview.frames]
    return _figures(frames + [None] * (len(captions) - len(frames)), captions, frames[0].size)


def row(images: Sequence[Tensor | None], size: tuple[int, int]) -> str:
    """Return HTML of an interpolation.

    Args:
        images: The first image, the images in between, the second image, uint8, shape `(C, H, W)`; None for a blank.
        size: Width and height of an image.
    """
    weights = [f"{i / (len(images) - 3):.2f}" for i in range(len(images) - 2)]
    pictures = [None if image is None else _upscaled(image[None], TILE_SIZE) for image in images]
    return _figures(pictures, ["first", *weights, "second"], size)


def progress_bar(preview: PreviewFrame | None = None, task: str = "") -> str:
    """Return HTML of a progress bar with the current step."""
    step, steps = (0, 1) if preview is None else (preview.step, preview.steps)
    line = "Ready" if preview is None else f"{task}step {step} of {steps}, {preview.seconds:.1f} s"
    return f'<div class="progress"><progress value="{step}" max="{steps}"></progress><span>{line}</span></div>'


def _upscaled(images: Tensor, max_size: int, labels: Sequence[str] = ()) -> Image.Image:
    pictures = to_pictures(images)
    columns = len(labels) or math.ceil(math.sqrt(len(pictures)))
    return grid(pictures, columns, max(1, max_size // (columns * pictures[0].width)), column_labels=labels)


def _figures(pictures: Sequence[Image.Image | None], captions: Sequence[str], size: tuple[int, int]) -> str:
    width, height = size
    figures = []
    for picture, caption in zip(pictures, captions, strict=True):
        content = f'<div class="blank" style="aspect-ratio: {width} / {height}"></div>'
        if picture is not None:
            content = f'<img src="{_data_url(picture)}" alt="{html.escape(caption)}">'
        figures.append(f"<figure>{content}<figcaption>{html.escape(caption)}</figcaption></figure>")
    return f'<div class="strip" style="max-width: {MAX_WIDTH * len(figures)}px">{"".join(figures)}</div>'


def _data_url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
