"""The demo of a model in the browser: images appear out of noise, and interpolations between two of them."""

import html
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import wraps
from typing import Any

import gradio as gr
import torch

from hf_ddpm.demo.demo import Demo, row, square, strip
from hf_ddpm.models.precision import choose_precision
from hf_ddpm.pipelines.pipeline_ddpm import load_pipeline
from hf_ddpm.sampling.samplers import SCHEDULERS
from hf_ddpm.utils.markdown import plain
from hf_ddpm.utils.public import hub_ids, strip_local_path

BETWEEN = SEEDS, IMAGES = "two seeds", "two images"
# Room for labels and buttons, which gradio lays over pictures; enlarged pixels unsmoothed; uploads in full size.
CSS = """.picture .image-container {padding-top: 2.3em} .picture img {image-rendering: pixelated}
.upload img {width: 100%; height: 100%; object-fit: contain}"""
UPLOAD = "32mb"  # largest uploaded file
WAITING = 32  # requests in the queue; further ones are refused
AT_ONCE = 2  # requests that sample at the same time


def generate(demo: Demo, count: float, seed: float, *settings: Any) -> Iterator[tuple]:
    """Yield images, their strip, and the progress."""
    for moment in demo.generate(demo.read(seed, *settings), count):
        yield square(moment.images), strip(moment), str(moment)


def interpolate(demo: Demo, between: str, t: float, count: float, *typed: Any) -> Iterator[tuple]:
    """Yield a row from one image to the other, and the progress."""
    seeds, paths, settings = typed[:2], typed[2:4], typed[4:]
    first, second = (demo.read(seed, *settings) for seed in seeds)
    if between == IMAGES:
        ends = [demo.read_image("first image", paths[0]), demo.read_image("second image", paths[1])]
    else:
        ends = []
        for sampling in (first, second):
            for moment in demo.generate(sampling, 1):
                yield None, f"seed {sampling.seed}: {moment}"
            ends.append(moment.images)
    for moment in demo.interpolate(*ends, t, count, first):
        yield row(ends[0], moment.images, ends[1]), str(moment)


def answer(handler: Callable[..., Iterator[tuple]], demo: Demo) -> Callable[..., Iterator[tuple]]:
    """Return the handler of a button; wrong input becomes a message."""

    @wraps(handler)
    def handle(*typed: Any) -> Iterator[tuple]:
        try:
            yield from handler(demo, *typed)
        except ValueError as error:
            raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from error

    return handle


def build(demo: Demo) -> gr.Blocks:
    """Return the app."""
    total, classless = demo.num_train_timesteps, demo.pipe.null_class is not None
    with gr.Blocks(title=plain(demo.name), analytics_enabled=False, delete_cache=(3600, 3600)) as app:
        gr.Markdown(f"# Denoising diffusion\n{demo.describe()}")
        with gr.Row():
            steps = gr.Number(min(total, 100), label=f"steps (1 to {total})")
            scheduler = gr.Dropdown(list(SCHEDULERS), label="sampler")
            first, known = [] if classless else demo.classes[:1], bool(demo.classes)
            classes = gr.Dropdown(demo.classes, value=first, multiselect=True, label="classes in turn", visible=known)
            guidance = gr.Slider(0, 8, 1, step=0.5, label="guidance (1: none)", visible=classless)
        settings = [steps, scheduler, classes, guidance]
        with gr.Tab("Generate"):
            generate_tab(demo, settings)
        with gr.Tab("Interpolate"):
            interpolate_tab(demo, settings)
    return app.queue(max_size=WAITING)


def generate_tab(demo: Demo, settings: list) -> None:
    """Lay out the generation of images of a seed."""
    images, on_the_way = picture("images"), picture("the first of them on the way")
    with gr.Row():
        with gr.Column(scale=2):
            count = gr.Slider(1, demo.most_images, min(16, demo.most_images), step=1, label="count")
            seed = gr.Number(0, label="seed")
            buttons("Generate", answer(generate, demo), [count, seed, *settings], [images, on_the_way])
        with gr.Column(scale=3):
            images.render()
    on_the_way.render()


def interpolate_tab(demo: Demo, settings: list) -> None:
    """Lay out the interpolation between two images."""
    total, most, path = demo.num_train_timesteps, demo.most_images, picture("from one to the other")
    between = gr.Radio(BETWEEN, value=SEEDS, label="between")
    with gr.Row() as seeds:
        ends = [gr.Number(0, label="first seed"), gr.Number(1, label="second seed")]
    with gr.Row(visible=False) as images:
        ends += [upload("first image"), upload("second image")]
    between.change(lambda kind: [gr.Row(visible=kind == own) for own in BETWEEN], between, [seeds, images])
    with gr.Row():
        t = gr.Slider(0, total - 1, total // 2, step=1, label="t: how far both are diffused")
        count = gr.Slider(2, most, min(9, most), step=1, label="count")
    buttons("Interpolate", answer(interpolate, demo), [between, t, count, *ends, *settings], [path])
    path.render()


def picture(label: str) -> gr.Image:
    """Return a picture, not yet placed, for download as PNG."""
    return gr.Image(label=label, format="png", buttons=["download", "fullscreen"], elem_classes="picture", render=False)


def upload(label: str) -> gr.Image:
    """Return an upload whose file is passed on unread: gradio has no message for a damaged one."""
    place = gr.Image(label=label, height=240, elem_classes=["picture", "upload"])
    place.preprocess = lambda file: file and file.path
    return place


def buttons(name: str, handler: Callable[..., Iterator[tuple]], inputs: list, pictures: list) -> None:
    """Lay out buttons to start and stop, and the progress: over pictures, it would hide them."""
    with gr.Row():
        start, stop = gr.Button(name, variant="primary"), gr.Button("Stop")
    progress = gr.Textbox(placeholder="progress", show_label=False, container=False)
    started = start.click(
        handler,
        inputs,
        [*pictures, progress],
        show_progress_on=progress,
        concurrency_limit=AT_ONCE,
        concurrency_id="sampling",
    )
    stop.click(None, cancels=[started])


def serve(demo: Demo, **options: Any) -> str:
    """Start the app; return its address."""
    return build(demo).launch(css=CSS, show_error=True, max_file_size=UPLOAD, **options)[1]


def show(model: str, precision: str = "auto") -> None:
    """Loads a model, serves its demo, and returns when that ends."""
    pipe = load_pipeline(model, "cuda" if torch.cuda.is_available() else "cpu")
    demo = Demo(pipe, strip_local_path(model, hub_ids(model)))
    if precision == "auto":
        choice = choose_precision(pipe.unet, pipe.image_shape, demo.most_images)
        print(choice.line, flush=True)
        precision = choice.precision
    serve(replace(demo, precision=precision))
