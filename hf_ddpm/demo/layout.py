"""What a demo shows of the images of a request: a grid, strips that wrap on a phone, a progress bar."""

import base64
import html
import io
from collections.abc import Iterable

from PIL import Image
from torch import Tensor

from hf_ddpm.demo.preview import Moment
from hf_ddpm.images import grid, to_pictures

# Pixels that small images are enlarged to at most: of a grid, of a picture in a strip.
GRID, TILE = 768, 192
# Images whose estimates are shown during sampling.
FIRST = 4
# Pixels of a browser that a picture in a strip takes at most.
WIDEST = 160
# Narrow strips wrap. Labels and buttons lie over pictures: they get room above them.
CSS = """
.picture .image-container {padding-top: 2.2em}
.picture img {max-height: 26rem}
.upload img {width: 100%; height: 100%; object-fit: contain}
.strip {display: grid; grid-template-columns: repeat(auto-fit, minmax(4.4rem, 1fr)); gap: .4rem}
.strip figure {margin: 0; text-align: center; font-size: .8rem}
.strip img, .strip .blank {display: block; width: 100%; margin: 0; border-radius: 4px}
.strip .blank {background: var(--border-color-primary)}
.progress {display: flex; align-items: center; gap: .8rem; min-height: 1.5rem; white-space: nowrap}
.progress progress {flex: 1; min-width: 4rem; height: .7rem; accent-color: var(--color-accent)}
.progress progress::-webkit-progress-value {background: var(--color-accent)}
.progress progress::-moz-progress-bar {background: var(--color-accent)}
"""


def sheet(images: Tensor) -> Image.Image:
    """Return images, bytes, as a grid."""
    return _enlarged(images, GRID)


def strip(moment: Moment) -> str:
    """Return HTML of the frames of the first images; frames to come are blank."""
    captions = [f"step {step}" for step in moment.frame_steps]
    frames = [_enlarged(frame[:FIRST], TILE) for frame in moment.frames]
    blanks = [None] * (len(captions) - len(frames))
    return _figures(zip([*frames, *blanks], captions, strict=True), frames[0].size)


def row(first: Tensor, between: Tensor, second: Tensor) -> str:
    """Return HTML of an interpolation: the ends, each shape `(1, C, H, W)`, and the images between them."""
    weights = [f"{i / (len(between) - 1):.2f}" for i in range(len(between))]
    pictures = [_enlarged(image[None], TILE) for image in (*first, *between, *second)]
    return _figures(zip(pictures, ["first", *weights, "second"], strict=True), pictures[0].size)


def progress_bar(moment: Moment | None = None, task: str = "") -> str:
    """Return HTML of a progress bar with the step."""
    step, steps = (0, 1) if moment is None else (moment.step, moment.steps)
    line = "Ready" if moment is None else f"{task}step {step} of {steps}"
    return f'<div class="progress"><progress value="{step}" max="{steps}"></progress><span>{line}</span></div>'


def _enlarged(images: Tensor, most: int) -> Image.Image:
    pictures = to_pictures(images)
    width = grid(pictures, scale=1).width
    return grid(pictures, scale=max(1, most // width))


def _figures(pictures: Iterable[tuple[Image.Image | None, str]], size: tuple[int, int]) -> str:
    width, height = size
    figures = []
    for picture, caption in pictures:
        shown = f'<div class="blank" style="aspect-ratio: {width} / {height}"></div>'
        if picture is not None:
            shown = f'<img src="{_data_url(picture)}" width="{width}" height="{height}" alt="{html.escape(caption)}">'
        figures.append(f"<figure>{shown}<figcaption>{html.escape(caption)}</figcaption></figure>")
    return f'<div class="strip" style="max-width: {WIDEST * len(figures)}px">{"".join(figures)}</div>'


def _data_url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
