"""Browser demo of a model: generate images, interpolate between two images, or inpaint an image."""

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

from hf_ddpm.demo.demo import MAX_REPEATS, Demo
from hf_ddpm.demo.layout import CSS, progress_bar, row, sheet, strip
from hf_ddpm.demo.preview import PAUSE, PreviewFrame
from hf_ddpm.images import to_pictures
from hf_ddpm.models.precision import choose_precision
from hf_ddpm.pipelines.loading import load_pipeline
from hf_ddpm.pipelines.pipeline_ddpm import DDPMPipeline
from hf_ddpm.sampling.options import Sampling
from hf_ddpm.sampling.samplers import SCHEDULERS
from hf_ddpm.utils.files import count_of
from hf_ddpm.utils.markdown import plain
from hf_ddpm.utils.public import hub_ids, strip_local_path
from hf_ddpm.utils.runs import run_folder

INTRODUCTION = "This model generates images: it starts from random noise and removes the noise step by step."
BETWEEN = SEEDS, IMAGES = "Two seeds", "Two images"
UPLOADS = "First image", "Second image"
INTERPOLATION_SAMPLERS = ("ddpm", "ddim")  # samplers that can start from a noisy image
CANVAS = 480  # maximum side of the canvas for painting, in pixels
MAX_UPLOAD = "32mb"  # maximum size of an uploaded file
MAX_WAITING = 32  # requests in the queue; further requests are rejected
MAX_RUNNING = 2  # requests that sample at the same time


def generate(demo: Demo, count: float, seed: float, *settings: Any) -> Iterator[tuple]:
    """Yield images, their strip if it has a new frame, the images of a distilled model, and the progress."""
    sampling, frames = demo.read(seed, *settings), 0
    update = distilled_update(demo.generate_distilled(sampling, count), sampling)
    for preview in demo.generate(sampling, count):
        frames, before = len(preview.frames), frames
        images = sheet(preview.images, sampling.class_labels)
        yield images, strip(preview) if frames > before else gr.skip(), update, progress_bar(preview)
        update = gr.skip()


def distilled_update(preview: PreviewFrame | None, sampling: Sampling) -> Any:
    """Return the update that shows the images of a distilled model with their steps and time; skip it without one."""
    if preview is None:
        return gr.skip()
    label = f"Distilled: {count_of(preview.steps, 'step')}, {preview.seconds:.1f} s"
    return gr.update(value=sheet(preview.images, sampling.class_labels), label=label)


def interpolate(demo: Demo, between: str, t: float, count: float, *inputs: Any) -> Iterator[tuple]:
    """Yield the images between two images, and the progress."""
    seeds, paths, settings = inputs[:2], inputs[2:4], inputs[4:]
    samplings = [demo.read(seed, *settings) for seed in seeds]
    if between == IMAGES:
        first, second = (demo.read_image(name, path) for name, path in zip(UPLOADS, paths, strict=True))
    else:
        ends = []
        for sampling in samplings:
            for preview in demo.generate(sampling, 1):
                yield gr.skip(), progress_bar(preview, f"seed {sampling.seed}: ")
            ends.append(preview.images)
        first, second = ends
    for preview in demo.interpolate(first, second, t, count, samplings[0]):
        yield row([*first, *preview.images, *second], demo.size), progress_bar(preview)


def sample_background(demo: Demo, seed: float, *settings: Any) -> Iterator[tuple]:
    """Yield an image to paint on, and the progress, only once at the end: each update replaces the editor."""
    *_, preview = demo.generate(demo.read(seed, *settings), 1)
    (image,) = to_pictures(preview.images)
    yield image.resize(canvas(demo), Image.Resampling.NEAREST), progress_bar(preview)


def inpaint(
    demo: Demo, drawing: tuple[bytes | None, list[bytes]], count: float, repeats: float, seed: float, *settings: Any
) -> Iterator[tuple]:
    """Yield images whose painted area is filled, and the progress."""
    image, mask = demo.read_drawing(*drawing)
    sampling = demo.read(seed, *settings)
    for preview in demo.inpaint(image, mask, count, repeats, sampling):
        yield sheet(preview.images), progress_bar(preview)


def with_errors(handler: Callable[..., Iterator[tuple]], demo: Demo) -> Callable[..., Iterator[tuple]]:
    """Return the event handler of a button, which shows invalid input as a message."""

    @wraps(handler)
    def handle(*inputs: Any) -> Iterator[tuple]:
        try:
            yield from handler(demo, *inputs)
        except ValueError as error:
            raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from error

    return handle


def draw_seeds(handler: Callable[..., Iterator[tuple]], positions: list[int]) -> Callable[..., Iterator[tuple]]:
    """Return a handler that replaces the inputs at some positions by random seeds, and also yields the seeds."""

    def handle(*inputs: Any) -> Iterator[tuple]:
        seeds = {position: secrets.randbelow(2**31) for position in positions}
        for outputs in handler(*(seeds.get(position, value) for position, value in enumerate(inputs))):
            yield *outputs, *seeds.values()

    return handle


class FirstView:
    """Images of the first view: sampled once, for the first visitor, and shown to all visitors.

    Args:
        demo: The demo; its default request is sampled.
    """

    def __init__(self, demo: Demo):
        self.demo = demo
        self.preview: PreviewFrame | None = None
        self.distilled: PreviewFrame | None = None
        self.worker = threading.Thread(target=self._run, daemon=True)
        self.starting = threading.Lock()

    async def show(self) -> AsyncIterator[tuple]:
        """Yield images, strip, images of a distilled model, and progress, until the images are complete."""
        with self.starting:
            if self.worker.ident is None:
                self.worker.start()
        is_running, last = True, None
        while is_running:
            is_running = self.worker.is_alive()
            if (preview := self.preview) is not last and preview is not None:
                request = self.demo.default_request
                images, update = sheet(preview.images, request.class_labels), distilled_update(self.distilled, request)
                yield images, strip(preview), update, progress_bar(preview)
                last = preview
            await asyncio.sleep(PAUSE if is_running else 0)

    def _run(self) -> None:
        request, count = self.demo.default_request, self.demo.default_images
        self.distilled = self.demo.generate_distilled(request, count)
        for preview in self.demo.generate(request, count):
            self.preview = preview


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
    return app.queue(max_size=MAX_WAITING)


def generate_tab(demo: Demo, app: gr.Blocks) -> None:
    """Lay out the tab that generates images, with images for the first view."""
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            with gr.Row():
                images, distilled = (picture(label) for label in ("Images", "Distilled"))
                distilled.visible = demo.distilled is not None
            progress = gr.HTML(progress_bar())
        with gr.Column(scale=2, min_width=320):
            controls = buttons("Generate", "Random seed")
            with gr.Row():
                count = gr.Slider(1, demo.max_images, demo.default_images, step=1, label="Number of images")
                seed = gr.Number(0, label="Seed")
            default = demo.default_request
            chosen = default.class_labels, default.guidance_scale
            options = settings(demo, f"Steps (1 to {demo.num_train_timesteps})", list(SCHEDULERS), *chosen)
            gr.Markdown("The first images during sampling:")
            frames = gr.HTML(elem_classes="frames")
    first_view = FirstView(demo)
    outputs = [images, frames, distilled, progress]
    view = app.load(
        first_view.show, None, outputs, show_progress="hidden", concurrency_limit=None, api_visibility="private"
    )
    connect(controls, with_errors(generate, demo), [count, seed, *options], outputs, [seed], [view])


def interpolate_tab(demo: Demo) -> None:
    """Lay out the tab that interpolates between two images."""
    total, default_count = demo.num_train_timesteps, min(9, demo.max_images)
    path, progress = gr.HTML(row([None] * (default_count + 2), demo.size)), gr.HTML(progress_bar())
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            controls = buttons("Interpolate", "Random seeds")
            between = gr.Radio(BETWEEN, value=SEEDS, label="Interpolate between")
            with gr.Row() as seeds:
                ends = [gr.Number(0, label="First seed"), gr.Number(1, label="Second seed")]
            with gr.Row(visible=False) as images:
                ends += [upload(name) for name in UPLOADS]
        with gr.Column(scale=2, min_width=320):
            t = gr.Slider(0, total - 1, total // 2, step=1, label="Noise added before mixing (t)")
            count = gr.Slider(2, demo.max_images, default_count, step=1, label="Number of images")
            options = settings(demo, "Steps (at most t + 1)", list(INTERPOLATION_SAMPLERS), demo.required_class)
    between.change(lambda kind: [gr.Row(visible=kind == own) for own in BETWEEN], between, [seeds, images])
    inputs = [between, t, count, *ends, *options]
    connect(controls, with_errors(interpolate, demo), inputs, [path, progress], ends[:2], [])


def inpaint_tab(demo: Demo) -> None:
    """Lay out the tab that inpaints an uploaded or sampled image."""
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            drawing = editor(demo)
            sample = gr.Button("Sample an image", size="sm")
            controls = buttons("Inpaint", "Random seed")
        with gr.Column(scale=2, min_width=320):
            images = picture("Images")
            progress = gr.HTML(progress_bar())
            with gr.Row():
                count = gr.Slider(1, demo.max_images, min(4, demo.max_images), step=1, label="Number of images")
                repeats = gr.Slider(1, MAX_REPEATS, 5, step=1, label="RePaint repeats (1: no resampling)")
            seed = gr.Number(0, label="Seed")
            options = settings(demo, f"Steps (1 to {demo.num_train_timesteps})", ["ddpm"], demo.required_class)
    queue = {"concurrency_limit": MAX_RUNNING, "concurrency_id": "sampling", "show_progress_on": progress}
    sampled = sample.click(with_errors(sample_background, demo), [seed, *options], [drawing, progress], **queue)
    inputs = [drawing, count, repeats, seed, *options]
    connect(controls, with_errors(inpaint, demo), inputs, [images, progress], [seed], [sampled])


class Recent(dict):
    """The newest `MAX_WAITING` drawings, to limit memory: a page may send drawings that it never uses."""

    def __setitem__(self, key: str, value: Any) -> None:
        """Add a drawing, and drop the oldest drawings."""
        super().__setitem__(key, value)
        while len(self) > MAX_WAITING:
            del self[next(iter(self))]


def canvas(demo: Demo) -> tuple[int, int]:
    """Return width and height of the canvas; small images are upscaled for painting."""
    width, height = demo.size
    scale = max(1, CANVAS // max(width, height))
    return width * scale, height * scale


def editor(demo: Demo) -> gr.ImageEditor:
    """Return an image editor that passes on the contents of its files without decoding them, as `upload` does."""
    brush = gr.Brush(default_size=CANVAS // 8, colors=["#e04040"], color_mode="fixed")
    component = gr.ImageEditor(
        label="Paint over the area to fill",
        sources=["upload"],
        brush=brush,
        layers=False,
        transforms=[],
        canvas_size=canvas(demo),
        fixed_canvas=True,
        buttons=[],
        elem_classes="editor",
    )

    component.blob_storage = Recent()

    def read(payload: Any) -> tuple[bytes | None, list[bytes]]:
        files = payload if payload is None or payload.id is None else component.blob_storage.pop(payload.id, None)
        if files is None:
            return None, []
        first, *layers = (
            file if file is None or isinstance(file, bytes) else Path(file.path).read_bytes()
            for file in (files.background, *files.layers)
        )
        return first, [layer for layer in layers if layer is not None]

    component.preprocess = read
    return component


def settings(demo: Demo, steps: str, schedulers: list[str], classes: list[str], guidance: float = 1.0) -> list:
    """Lay out the sampling settings, with the selected classes and guidance scale."""
    number = demo.default_request.num_inference_steps
    with gr.Row():
        options = [gr.Number(number, label=steps), gr.Dropdown(schedulers, label="Sampler")]
    names = demo.classes
    options.append(gr.Dropdown(names, value=classes, multiselect=True, label="Classes", visible=bool(names)))
    is_guided = demo.pipe.null_class is not None
    return [*options, gr.Slider(0, 8, guidance, step=0.5, label="Guidance scale (1: off)", visible=is_guided)]


def upload(label: str) -> gr.Image:
    """Return an upload that passes on the file's path without decoding it: gradio has no error for damaged files."""
    component = gr.Image(label=label, height=240, elem_classes=["picture", "upload"])
    component.preprocess = lambda file: file and file.path
    return component


def picture(label: str) -> gr.Image:
    """Return an output for images, with buttons to download and enlarge it."""
    return gr.Image(
        label=label, format="png", min_width=240, buttons=["download", "fullscreen"], elem_classes="picture"
    )


def buttons(start: str, random: str) -> list[gr.Button]:
    """Lay out the buttons: start, start with random seeds, stop."""
    kinds = {start: "primary", random: "secondary", "Stop": "secondary"}
    with gr.Row(elem_classes="buttons"):
        return [gr.Button(name, variant=kind, size="md", min_width=60) for name, kind in kinds.items()]


def connect(
    controls: list[gr.Button],
    handler: Callable[..., Iterator[tuple]],
    inputs: list,
    outputs: list,
    seeds: list,
    earlier: list,
) -> None:
    """Connect the buttons; each start button cancels `earlier` events and the events of the other start button.

    Waiting is shown on the progress bar, the last of `outputs`, since it would hide images.
    """
    start, random, stop = controls
    options = {"show_progress_on": outputs[-1], "concurrency_limit": MAX_RUNNING, "concurrency_id": "sampling"}
    handler_with_random_seeds = draw_seeds(handler, [inputs.index(seed) for seed in seeds])
    # Gradio runs the events of a button in this order: cancel other events before starting a long one.
    clicked = random.click(None, js="() => []", api_visibility="private")
    restarted = clicked.then(handler_with_random_seeds, inputs, [*outputs, *seeds], api_visibility="private", **options)
    start.click(None, cancels=[*earlier, restarted])
    started = start.click(handler, inputs, outputs, **options)
    random.click(None, cancels=[*earlier, started])
    stop.click(None, cancels=[*earlier, started, restarted])


def serve(demo: Demo, **options: Any) -> str:
    """Start the app; return its URL."""
    return build(demo).launch(css=CSS, show_error=True, max_file_size=MAX_UPLOAD, **options)[1]


def describe_images(pipe: DDPMPipeline) -> str:
    """Return a text with size, channels and classes of the images of a model."""
    channels, height, width = pipe.image_shape
    embeddings = pipe.unet.config.num_class_embeds or 0
    classes = ", ".join(pipe.class_names) or (f"{embeddings} without names" if embeddings else "none")
    return f"images of {height}x{width} pixels with {channels} channels, classes: {classes}"


def show(model: str, background: str = "white", precision: str = "auto", distilled: str | None = None) -> None:
    """Load a model, and optionally a model distilled from it, and serve their demo until the server stops."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = load_pipeline(model, device)
    if hub_ids(model):
        demo = Demo(pipe, model, f"{constants.ENDPOINT}/{model}", background)
    else:
        demo = Demo(pipe, strip_local_path(str(run_folder(model))), background=background)
    if distilled:
        demo.distilled = load_pipeline(distilled, device)
        if (images := describe_images(demo.distilled)) != (expected := describe_images(pipe)):
            raise ValueError(f"--distilled {distilled}: {images}; expected {expected}, like the model")
    if precision == "auto":
        choice = choose_precision(pipe.unet, pipe.image_shape, demo.max_images)
        print(choice.line, flush=True)
        precision = choice.precision
    serve(replace(demo, precision=precision))
