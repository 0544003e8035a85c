"""The demo of a model in the browser: images form out of noise, between two of them, or around what is kept of one."""

import asyncio
import html
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from huggingface_hub import constants
from PIL import Image

from hf_ddpm.demo.demo import MOST_PASSES, Demo
from hf_ddpm.demo.layout import CSS, progress_bar, row, sheet, strip
from hf_ddpm.demo.preview import PAUSE, Moment
from hf_ddpm.images import to_pictures
from hf_ddpm.models.precision import choose_precision
from hf_ddpm.pipelines.pipeline_ddpm import DDPMPipeline, load_pipeline
from hf_ddpm.sampling.options import Sampling
from hf_ddpm.sampling.samplers import SCHEDULERS
from hf_ddpm.utils.markdown import plain
from hf_ddpm.utils.public import hub_ids, strip_local_path
from hf_ddpm.utils.runs import run_folder

INTRODUCTION = "This model makes new images: it starts from random noise and removes the noise step by step."
BETWEEN = SEEDS, IMAGES = "Two seeds", "Two images"
UPLOADS = "First image", "Second image"
BACK_FROM_LATENTS = ("ddpm", "ddim")  # samplers that start from a noised image
CANVAS = 480  # largest side of an image to paint on, in pixels
UPLOAD = "32mb"  # largest uploaded file
WAITING = 32  # requests in the queue; further ones are refused
AT_ONCE = 2  # requests that sample at the same time


def generate(demo: Demo, count: float, seed: float, *settings: Any) -> Iterator[tuple]:
    """Yield images, their strip when it has a new frame, the images of a distilled model, and the progress."""
    sampling, frames = demo.read(seed, *settings), 0
    few = show_shortcut(demo.shortcut(sampling, count), sampling)
    for moment in demo.generate(sampling, count):
        frames, before = len(moment.frames), frames
        images = sheet(moment.images, sampling.class_labels)
        yield images, strip(moment) if frames > before else gr.skip(), few, progress_bar(moment)
        few = gr.skip()


def show_shortcut(moment: Moment | None, sampling: Sampling) -> Any:
    """Return the update that shows the images of a distilled model with their steps and time, or nothing."""
    if moment is None:
        return gr.skip()
    steps = "1 step" if moment.steps == 1 else f"{moment.steps} steps"
    label = f"Distilled: {steps}, {moment.seconds:.1f} s"
    return gr.update(value=sheet(moment.images, sampling.class_labels), label=label)


def interpolate(demo: Demo, between: str, t: float, count: float, *typed: Any) -> Iterator[tuple]:
    """Yield the images from one to the other, and the progress."""
    seeds, paths, settings = typed[:2], typed[2:4], typed[4:]
    samplings = [demo.read(seed, *settings) for seed in seeds]
    if between == IMAGES:
        first, second = (demo.read_image(name, path) for name, path in zip(UPLOADS, paths, strict=True))
    else:
        ends = []
        for sampling in samplings:
            for moment in demo.generate(sampling, 1):
                yield gr.skip(), progress_bar(moment, f"seed {sampling.seed}: ")
            ends.append(moment.images)
        first, second = ends
    for moment in demo.interpolate(first, second, t, count, samplings[0]):
        yield row([*first, *moment.images, *second], demo.size), progress_bar(moment)


def sample_background(demo: Demo, seed: float, *settings: Any) -> Iterator[tuple]:
    """Yield an image to paint on, and the progress, at the end: an update on the way would replace the editor."""
    *_, moment = demo.generate(demo.read(seed, *settings), 1)
    (image,) = to_pictures(moment.images)
    yield image.resize(canvas(demo), Image.Resampling.NEAREST), progress_bar(moment)


def inpaint(
    demo: Demo, drawing: tuple[bytes | None, list[bytes]], count: float, passes: float, seed: float, *settings: Any
) -> Iterator[tuple]:
    """Yield fills of the painted part of an image, and the progress."""
    image, mask = demo.read_drawing(*drawing)
    sampling = demo.read(seed, *settings)
    for moment in demo.inpaint(image, mask, count, passes, sampling):
        yield sheet(moment.images), progress_bar(moment)


def answer(handler: Callable[..., Iterator[tuple]], demo: Demo) -> Callable[..., Iterator[tuple]]:
    """Return the handler of a button; wrong input becomes a message."""

    @wraps(handler)
    def handle(*typed: Any) -> Iterator[tuple]:
        try:
            yield from handler(demo, *typed)
        except ValueError as error:
            raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from error

    return handle


def draw_seeds(handler: Callable[..., Iterator[tuple]], places: list[int]) -> Callable[..., Iterator[tuple]]:
    """Return a handler that takes random seeds instead of those at some places of its input, and yields them, too."""

    def handle(*typed: Any) -> Iterator[tuple]:
        drawn = {place: secrets.randbelow(2**31) for place in places}
        for shown in handler(*(drawn.get(place, value) for place, value in enumerate(typed))):
            yield *shown, *drawn.values()

    return handle


class FirstView:
    """Images for the first view: sampled once, when the first visitor comes, and shown to all.

    Args:
        demo: The demo; its default request is sampled.
    """

    def __init__(self, demo: Demo):
        self.demo = demo
        self.moment: Moment | None = None
        self.shortcut: Moment | None = None
        self.worker = threading.Thread(target=self._run, daemon=True)
        self.starting = threading.Lock()

    async def show(self) -> AsyncIterator[tuple]:
        """Yield images, strip, images of a distilled model, and progress until the images are complete."""
        with self.starting:
            if self.worker.ident is None:
                self.worker.start()
        is_running, shown = True, None
        while is_running:
            is_running = self.worker.is_alive()
            if (moment := self.moment) is not shown and moment is not None:
                few = show_shortcut(self.shortcut, self.demo.usual)
                yield sheet(moment.images), strip(moment), few, progress_bar(moment)
                shown = moment
            await asyncio.sleep(PAUSE if is_running else 0)

    def _run(self) -> None:
        count = self.demo.usual_images
        self.shortcut = self.demo.shortcut(self.demo.usual, count)
        for moment in self.demo.generate(self.demo.usual, count):
            self.moment = moment


def build(demo: Demo) -> gr.Blocks:
    """Return the app."""
    with gr.Blocks(title=plain(demo.name), analytics_enabled=False, delete_cache=(3600, 3600)) as app:
        gr.Markdown(f"## Denoising diffusion\n{INTRODUCTION}\n\n{demo.describe()}")
        with gr.Tab("Generate"):
            generate_tab(demo, app)
        with gr.Tab("Interpolate"):
            interpolate_tab(demo)
        with gr.Tab("Inpaint"):
            inpaint_tab(demo)
    return app.queue(max_size=WAITING)


def generate_tab(demo: Demo, app: gr.Blocks) -> None:
    """Lay out the generation of images of a seed, with images for the first view."""
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            with gr.Row():
                images, few = (picture(label) for label in ("Images", "Distilled"))
                few.visible = demo.distilled is not None
            progress = gr.HTML(progress_bar())
        with gr.Column(scale=2, min_width=320):
            pressed = buttons("Generate", "Random seed")
            with gr.Row():
                count = gr.Slider(1, demo.most_images, demo.usual_images, step=1, label="Number of images")
                seed = gr.Number(0, label="Seed")
            chosen = settings(demo, f"Steps (1 to {demo.num_train_timesteps})", list(SCHEDULERS))
            gr.Markdown("The first images, step by step:")
            frames = gr.HTML(elem_classes="frames")
    first_view = FirstView(demo)
    outputs = [images, frames, few, progress]
    view = app.load(
        first_view.show, None, outputs, show_progress="hidden", concurrency_limit=None, api_visibility="private"
    )
    connect(pressed, answer(generate, demo), [count, seed, *chosen], outputs, [seed], [view])


def interpolate_tab(demo: Demo) -> None:
    """Lay out the interpolation between two images."""
    total, most = demo.num_train_timesteps, demo.most_images
    usual = min(9, most)
    path, progress = gr.HTML(row([None] * (usual + 2), demo.size)), gr.HTML(progress_bar())
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            pressed = buttons("Interpolate", "Random seeds")
            between = gr.Radio(BETWEEN, value=SEEDS, label="Between")
            with gr.Row() as seeds:
                ends = [gr.Number(0, label="First seed"), gr.Number(1, label="Second seed")]
            with gr.Row(visible=False) as images:
                ends += [upload(name) for name in UPLOADS]
        with gr.Column(scale=2, min_width=320):
            t = gr.Slider(0, total - 1, total // 2, step=1, label="Noise added before mixing (t)")
            count = gr.Slider(2, most, usual, step=1, label="Number of images")
            chosen = settings(demo, "Steps (at most t + 1)", list(BACK_FROM_LATENTS))
    between.change(lambda kind: [gr.Row(visible=kind == own) for own in BETWEEN], between, [seeds, images])
    inputs = [between, t, count, *ends, *chosen]
    connect(pressed, answer(interpolate, demo), inputs, [path, progress], ends[:2], [])


def inpaint_tab(demo: Demo) -> None:
    """Lay out the inpainting of an image, uploaded or sampled, with a brush."""
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            drawing = editor(demo)
            sample = gr.Button("Sample an image", size="sm")
            pressed = buttons("Inpaint", "Random seed")
        with gr.Column(scale=2, min_width=320):
            images = picture("Images")
            progress = gr.HTML(progress_bar())
            with gr.Row():
                count = gr.Slider(1, demo.most_images, min(4, demo.most_images), step=1, label="Number of fills")
                passes = gr.Slider(1, MOST_PASSES, 5, step=1, label="Passes (1: no jumps)")
            seed = gr.Number(0, label="Seed")
            chosen = settings(demo, f"Steps (1 to {demo.num_train_timesteps})", ["ddpm"])
    waiting = {"concurrency_limit": AT_ONCE, "concurrency_id": "sampling", "show_progress_on": progress}
    sampled = sample.click(answer(sample_background, demo), [seed, *chosen], [drawing, progress], **waiting)
    inputs = [drawing, count, passes, seed, *chosen]
    connect(pressed, answer(inpaint, demo), inputs, [images, progress], [seed], [sampled])


class Recent(dict):
    """The newest `WAITING` drawings: those that a page has sent, and then not requested a fill of, are dropped."""

    def __setitem__(self, key: str, value: Any) -> None:
        """Add a drawing, and drop the oldest ones."""
        super().__setitem__(key, value)
        while len(self) > WAITING:
            del self[next(iter(self))]


def canvas(demo: Demo) -> tuple[int, int]:
    """Return width and height of the canvas: images are enlarged to be painted on."""
    width, height = demo.size
    scale = max(1, CANVAS // max(width, height))
    return width * scale, height * scale


def editor(demo: Demo) -> gr.ImageEditor:
    """Return an image to paint on, whose files are passed on unread, as in `upload`."""
    brush = gr.Brush(default_size=CANVAS // 8, colors=["#e04040"], color_mode="fixed")
    place = gr.ImageEditor(
        label="Paint what to fill",
        sources=["upload"],
        brush=brush,
        layers=False,
        transforms=[],
        canvas_size=canvas(demo),
        fixed_canvas=True,
        buttons=[],
        elem_classes="editor",
    )

    place.blob_storage = Recent()

    def read(payload: Any) -> tuple[bytes | None, list[bytes]]:
        files = payload if payload is None or payload.id is None else place.blob_storage.pop(payload.id, None)
        if files is None:
            return None, []
        first, *layers = (
            file if file is None or isinstance(file, bytes) else Path(file.path).read_bytes()
            for file in (files.background, *files.layers)
        )
        return first, [layer for layer in layers if layer is not None]

    place.preprocess = read
    return place


def settings(demo: Demo, steps: str, schedulers: list[str]) -> list:
    """Lay out the settings of sampling."""
    with gr.Row():
        chosen = [gr.Number(demo.usual.num_inference_steps, label=steps), gr.Dropdown(schedulers, label="Sampler")]
    classes, first = demo.classes, demo.usual.class_labels
    chosen.append(gr.Dropdown(classes, value=first, multiselect=True, label="Classes", visible=bool(classes)))
    is_guided = demo.pipe.null_class is not None
    return [*chosen, gr.Slider(0, 8, 1, step=0.5, label="Guidance scale (1: none)", visible=is_guided)]


def upload(label: str) -> gr.Image:
    """Return an upload whose file is passed on unread: gradio has no message for a damaged one."""
    place = gr.Image(label=label, height=240, elem_classes=["picture", "upload"])
    place.preprocess = lambda file: file and file.path
    return place


def picture(label: str) -> gr.Image:
    """Return a place for images, to be downloaded and enlarged."""
    return gr.Image(
        label=label, format="png", min_width=240, buttons=["download", "fullscreen"], elem_classes="picture"
    )


def buttons(start: str, random: str) -> list[gr.Button]:
    """Lay out buttons to start, to start with random seeds, and to stop."""
    kinds = {start: "primary", random: "secondary", "Stop": "secondary"}
    with gr.Row(elem_classes="buttons"):
        return [gr.Button(name, variant=kind, size="md", min_width=60) for name, kind in kinds.items()]


def connect(
    pressed: list[gr.Button],
    handler: Callable[..., Iterator[tuple]],
    inputs: list,
    outputs: list,
    seeds: list,
    earlier: list,
) -> None:
    """Connect the buttons; each of the first two ends `earlier` events and what the other one has started.

    Waits are shown on the progress, the last of `outputs`: over pictures, they would hide them.
    """
    start, random, stop = pressed
    options = {"show_progress_on": outputs[-1], "concurrency_limit": AT_ONCE, "concurrency_id": "sampling"}
    drawing = draw_seeds(handler, [inputs.index(seed) for seed in seeds])
    # The events of a button wait for each other in this order: what ends others comes before what takes long.
    drawn = random.click(None, js="() => []", api_visibility="private")
    restarted = drawn.then(drawing, inputs, [*outputs, *seeds], api_visibility="private", **options)
    start.click(None, cancels=[*earlier, restarted])
    started = start.click(handler, inputs, outputs, **options)
    random.click(None, cancels=[*earlier, started])
    stop.click(None, cancels=[*earlier, started, restarted])


def serve(demo: Demo, **options: Any) -> str:
    """Start the app; return its address."""
    return build(demo).launch(css=CSS, show_error=True, max_file_size=UPLOAD, **options)[1]


def describe_images(pipe: DDPMPipeline) -> str:
    """Return a line on the images that a model draws: size, channels, classes."""
    channels, height, width = pipe.image_shape
    embeddings = pipe.unet.config.num_class_embeds or 0
    classes = ", ".join(pipe.class_names) or (f"{embeddings} numbers" if embeddings else "none")
    return f"images of {height}x{width} pixels with {channels} channels, classes: {classes}"


def show(model: str, background: str = "white", precision: str = "auto", distilled: str | None = None) -> None:
    """Load a model and one distilled from it, serve their demo, and return when that ends."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = load_pipeline(model, device)
    if hub_ids(model):
        demo = Demo(pipe, model, f"{constants.ENDPOINT}/{model}", background)
    else:
        demo = Demo(pipe, strip_local_path(str(run_folder(model))), background=background)
    if distilled:
        demo.distilled = load_pipeline(distilled, device)
        if (found := describe_images(demo.distilled)) != (expected := describe_images(pipe)):
            raise ValueError(f"--distilled {distilled}: draws {found}; expected {expected}, like the model")
    if precision == "auto":
        choice = choose_precision(pipe.unet, pipe.image_shape, demo.most_images)
        print(choice.line, flush=True)
        precision = choice.precision
    serve(replace(demo, precision=precision))
