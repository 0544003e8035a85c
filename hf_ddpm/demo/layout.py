"""Pictures of a request in the browser: a grid, strips that wrap on a phone, a progress bar."""

import base64
import html
import io
import math
from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from hf_ddpm.demo.preview import Moment
from hf_ddpm.images import MOST_CLASSES, grid, to_pictures

# Pixels up to which small images are enlarged: of a grid, of a picture in a strip.
GRID, TILE = 768, 192
# Images whose estimates are shown during sampling.
FIRST = 4
# Largest width of a picture in a strip, in pixels of the browser.
WIDEST = 160
# Labels and buttons lie over pictures: they get room above them.
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
    """Return images, bytes, as a grid; a column per class if several classes take turns."""
    return _enlarged(images, GRID, classes[: len(images)] if 1 < len(classes) <= MOST_CLASSES else ())


def strip(moment: Moment) -> str:
    """Return HTML of the frames of the first images; frames to come are blank."""
    captions = [f"step {step}" for step in moment.frame_steps]
    frames = [_enlarged(frame[:FIRST], TILE) for frame in moment.frames]
    return _figures(frames + [None] * (len(captions) - len(frames)), captions, frames[0].size)


def row(images: Sequence[Tensor | None], size: tuple[int, int]) -> str:
    """Return HTML of an interpolation.

    Args:
        images: The first image, those between, the second image, bytes, shape `(C, H, W)`; None is blank.
        size: Width and height of an image.
    """
    weights = [f"{i / (len(images) - 3):.2f}" for i in range(len(images) - 2)]
    pictures = [None if image is None else _enlarged(image[None], TILE) for image in images]
    return _figures(pictures, ["first", *weights, "second"], size)


def progress_bar(moment: Moment | None = None, task: str = "") -> str:
    """Return HTML of a progress bar with the step."""
    step, steps = (0, 1) if moment is None else (moment.step, moment.steps)
    line = "Ready" if moment is None else f"{task}step {step} of {steps}, {moment.seconds:.1f} s"
    return f'<div class="progress"><progress value="{step}" max="{steps}"></progress><span>{line}</span></div>'


def _enlarged(images: Tensor, most: int, labels: Sequence[str] = ()) -> Image.Image:
    pictures = to_pictures(images)
    columns = len(labels) or math.ceil(math.sqrt(len(pictures)))
    return grid(pictures, columns, max(1, most // (columns * pictures[0].width)), column_labels=labels)


def _figures(pictures: Sequence[Image.Image | None], captions: Sequence[str], size: tuple[int, int]) -> str:
    width, height = size
    figures = []
    for picture, caption in zip(pictures, captions, strict=True):
        shown = f'<div class="blank" style="aspect-ratio: {width} / {height}"></div>'
        if picture is not None:
            shown = f'<img src="{_data_url(picture)}" alt="{html.escape(caption)}">'
        figures.append(f"<figure>{shown}<figcaption>{html.escape(caption)}</figcaption></figure>")
    return f'<div class="strip" style="max-width: {WIDEST * len(figures)}px">{"".join(figures)}</div>'


def _data_url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
