import asyncio
import io
import re
import threading
from concurrent.futures import as_completed
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image

from hf_ddpm import DDPMPipeline, DDPMScheduler, UNet2DModel
from hf_ddpm.demo.demo import Demo
from hf_ddpm.demo.layout import progress_bar, row, sheet, strip
from hf_ddpm.models.precision import Choice
from tests.conftest import LIMIT, TINY_UNET, load_script

ROOT = Path(__file__).parents[2]
SPACE = ROOT / "hf_ddpm" / "demo" / "space"


@pytest.fixture(scope="module")
def app():
    pytest.importorskip("gradio")
    from hf_ddpm.demo import app

    return app


@pytest.fixture
def demo(tiny_pipeline):
    return Demo(tiny_pipeline, "tiny")


def without_time(progress):
    return re.sub(r", \d+\.\d s<", "<", progress)


def test_generate_yields_images_strip_and_progress(app, demo):
    outputs = list(app.with_errors(app.generate, demo)(3, 0, 20, "ddpm", [], 1))
    *_, last = demo.generate(demo.read(0, 20, "ddpm"), 3)
    assert outputs[-1][0].tobytes() == sheet(last.images).tobytes()
    assert outputs[-1][1] == strip(last) and outputs[-1][2] == app.gr.skip()
    assert re.search(r"step 0 of 20, 0\.\d s<", outputs[0][3]) and "step 20 of 20, " in outputs[-1][3]
    previews = {picture.tobytes() for picture, *_ in outputs[:-1]}
    assert len(previews) >= 2 and outputs[-1][0].tobytes() not in previews
    strips = [frames for _, frames, *_ in outputs if isinstance(frames, str)]
    assert len(strips) == len(set(strips)) == 8  # sent only if it has changed


def test_distilled_model_samples_same_noise_in_its_own_steps(app, tiny_pipeline):
    distilled = DDPMPipeline(tiny_pipeline.unet, DDPMScheduler(prediction_type="sample"), num_inference_steps=4)
    demo = Demo(tiny_pipeline, "tiny", distilled=distilled)
    outputs = list(app.with_errors(app.generate, demo)(3, 7, 20, "ddim", [], 1))
    *_, expected = Demo(distilled, "distilled").generate(demo.read(7, 4, "ddpm"), 3)
    first, *later = [output[2] for output in outputs]
    assert first["value"].tobytes() == sheet(expected.images).tobytes()
    assert re.fullmatch(r"Distilled: 4 steps, \d+\.\d s", first["label"])
    assert later and all(update == app.gr.skip() for update in later)
    outputs = asyncio.run(visit(app.FirstView(demo), leaves_early=False))  # seed 0, 50 steps, 16 images
    *_, expected = Demo(distilled, "distilled").generate(demo.read(0, 4, "ddpm"), 16)
    assert outputs[-1][2]["value"].tobytes() == sheet(expected.images).tobytes()


def test_distilled_model_of_other_images_is_rejected(app, tiny_pipeline, monkeypatch, tmp_path):
    other = DDPMPipeline(UNet2DModel(**{**TINY_UNET, "sample_size": 16}), DDPMScheduler())
    pipes = {"model": tiny_pipeline, "other": other}
    monkeypatch.setattr(app, "load_pipeline", lambda model, device: pipes[model])
    expected = r"--distilled other: images of 16x16 pixels .*; expected images of 8x8 pixels .*, like the model"
    with pytest.raises(ValueError, match=expected):
        load_script("app").main(["--model", "model", "--distilled", "other", "--mixed_precision", "no"])
    served = []
    monkeypatch.setattr(app, "serve", served.append)
    monkeypatch.setenv("DISTILLED_MODEL_ID", "model")
    load_script("app").main(["--model", "model", "--mixed_precision", "no"])
    assert served[0].distilled is tiny_pipeline


def test_interpolation_between_seeds(app, demo):
    inputs = (app.SEEDS, 20, 3, 4, 9, None, None, 5, "ddim", [], 1)
    outputs = list(app.with_errors(app.interpolate, demo)(*inputs))
    assert outputs[0][0] == app.gr.skip() and "seed 4: step 0 of 5" in outputs[0][1]
    ends = [list(demo.generate(demo.read(seed, 5, "ddim"), 1))[-1].images for seed in (4, 9)]
    *_, last = demo.interpolate(*ends, 20, 3, demo.read(4, 5, "ddim"))
    path, progress = outputs[-1]
    assert path == row([*ends[0], *last.images, *ends[1]], (8, 8))
    assert without_time(progress) == without_time(progress_bar(last))


def test_interpolation_between_uploaded_images(app, demo, tmp_path):
    for name, gray in (("black", 0), ("white", 255)):
        Image.new("L", (30, 20), gray).save(tmp_path / f"{name}.png")
    paths = [str(tmp_path / f"{name}.png") for name in ("black", "white")]
    *_, (picture, _) = app.with_errors(app.interpolate, demo)(app.IMAGES, 0, 2, 0, 0, *paths, 5, "ddpm", [], 1)
    ends = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 8, 8)
    *_, last = demo.interpolate(ends[:1], ends[1:], 0, 2, demo.read(0, 5, "ddpm"))
    assert picture == row([ends[0], *last.images, ends[1]], (8, 8))


def test_inpainting_of_sampled_image(app, demo):
    ((background, progress),) = app.with_errors(app.sample_background, demo)(4, 5, "ddpm", [], 1)
    *_, sampled = demo.generate(demo.read(4, 5, "ddpm"), 1)
    assert background.size == app.canvas(demo) == (480, 480) and "step 5 of 5" in progress
    layer = Image.new("RGBA", (480, 480))
    layer.paste("red", (0, 240, 480, 480))
    # The browser sends either files or the id of uploaded blobs.
    editor, files = app.editor(demo), []
    for image in (background, layer):
        with io.BytesIO() as file:
            image.save(file, format="PNG")
            files.append(file.getvalue())
    editor.blob_storage["1"] = SimpleNamespace(background=files[0], layers=[None, files[1]])
    sent = SimpleNamespace(id="1", background=None, layers=[])
    drawing = editor.preprocess(sent)
    assert drawing == (files[0], [files[1]]) and editor.blob_storage == {}
    for i in range(100):
        editor.blob_storage[f"{i}"] = sent
    assert list(editor.blob_storage) == [f"{i}" for i in range(100 - app.MAX_WAITING, 100)]
    editor.blob_storage.clear()
    assert editor.preprocess(None) == editor.preprocess(sent) == (None, [])

    *_, (images, progress) = app.with_errors(app.inpaint, demo)(drawing, 2, 1, 0, 5, "ddpm", [], 1)
    mask = torch.arange(8).view(8, 1).expand(8, 8) >= 4
    *_, last = demo.inpaint(sampled.images, mask, 2, 1, demo.read(0, 5, "ddpm"))
    assert images.tobytes() == sheet(last.images).tobytes()
    assert without_time(progress) == without_time(progress_bar(last))
    with pytest.raises(app.gr.Error, match="image is missing: upload or sample an image"):
        list(app.with_errors(app.inpaint, demo)((None, []), 2, 1, 0, 5, "ddpm", [], 1))


def test_random_seeds_are_used_and_shown(app, demo):
    handler = app.draw_seeds(app.with_errors(app.generate, demo), [1])
    outputs = [list(handler(2, 0, 3, "ddpm", [], 1))[-1] for _ in range(2)]
    seeds = [output[-1] for output in outputs]
    for seed, (images, *_) in zip(seeds, outputs, strict=True):
        *_, last = demo.generate(demo.read(seed, 3, "ddpm"), 2)
        assert images.tobytes() == sheet(last.images).tobytes()
    assert len({0, *seeds}) == 3 and all(0 <= seed < 2**31 for seed in seeds)


async def visit(view, leaves_early):
    outputs = []
    async for output in view.show():
        outputs.append(output)
        if leaves_early:
            break
    return outputs


def test_first_view_is_sampled_once_for_all_visitors(app, demo):
    started, generate = [], demo.generate

    def sample(*request):
        started.append(1)
        return generate(*request)

    demo.generate = sample
    view = app.FirstView(demo)
    assert not started  # before the first visitor
    asyncio.run(visit(view, leaves_early=True))

    async def visit_together():
        return await asyncio.gather(*(visit(view, leaves_early=False) for _ in range(3)))

    *_, last = generate(demo.default_request, demo.default_images)
    for outputs in asyncio.run(visit_together()):
        assert outputs[-1][0].tobytes() == sheet(last.images, demo.default_request.class_labels).tobytes()
        assert outputs[-1][1] == strip(last) and "step 50 of 50, " in outputs[-1][3]
    assert started == [1]


def test_first_view_matches_initial_values_of_form(app, demo):
    values = {}
    for block in app.build(demo).blocks.values():
        if isinstance(block, app.gr.components.FormComponent):
            values.setdefault(block.label, block.value)  # keeps the values of the first tab
    form = [values[label] for label in ("Seed", "Steps (1 to 1000)", "Sampler")]
    assert demo.default_request == demo.read(*form) and demo.default_images == values["Number of images"]


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("generate", (0, 0, 5, "ddpm", [], 1), "count=0: expected a whole number from 1 to 64"),
        ("generate", (1, 0.5, 5, "ddpm", [], 1), "seed=0.5: expected a whole number"),
        ("generate", (1, 0, 1001, "ddpm", [], 1), "steps=1001: expected a whole number from 1 to 1000"),
        ("generate", (1, 0, 5, "ddpm", ["7"], 1), "class_labels: the model has no classes; expected none"),
        ("interpolate", ("Two images", 5, 2, 0, 1, None, None, 5, "ddpm", [], 1), "First image is missing: upload"),
        ("interpolate", ("Two seeds", 1000, 2, 0, 1, None, None, 1, "ddpm", [], 1), "t=1000: expected a whole number"),
    ],
)
def test_invalid_input_is_shown_as_message(app, demo, name, inputs, message):
    with pytest.raises(app.gr.Error, match=message):
        list(app.with_errors(getattr(app, name), demo)(*inputs))


def test_html_in_input_is_escaped_in_message(app, demo):
    with pytest.raises(app.gr.Error) as caught:
        list(app.with_errors(app.generate, demo)(1, 0, 5, "<img src=x onerror=alert(1)>", [], 1))
    assert "&lt;img src=x onerror=alert(1)&gt;" in caught.value.message and "<" not in caught.value.message


def test_class_inputs_are_only_visible_for_models_with_classes(app, demo):
    def class_inputs(demo):
        blocks = [block for block in app.build(demo).blocks.values() if getattr(block, "label", None)]
        names = ("Classes", "Guidance")
        return [block.value for block in blocks if block.visible and block.label.startswith(names)]

    assert class_inputs(demo) == []
    # Guidance requires a null class, the third embedding. The tabs: Generate, Interpolate, Inpaint.
    both = ["cat", "dog"]
    for embeddings, expected in ((3, [both, 2.0, [], 1.0, [], 1.0]), (2, [both, ["cat"], ["cat"]])):
        unet = UNet2DModel(**TINY_UNET, num_class_embeds=embeddings)
        pipe = DDPMPipeline(unet, DDPMScheduler(), {"0": "cat", "1": "dog"})
        assert class_inputs(Demo(pipe, "classes")) == expected


def test_model_is_selected_by_option_or_environment(app, monkeypatch, tmp_path):
    monkeypatch.delenv("MODEL_ID", raising=False)
    for missing in (None, ""):
        if missing is not None:
            monkeypatch.setenv("MODEL_ID", missing)
        with pytest.raises(ValueError, match="^--model is missing: expected a folder or Hub id, .* variable MODEL_ID$"):
            load_script("space/app").main([])
    monkeypatch.setenv("MODEL_ID", str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="nothing' cannot be loaded"):
        load_script("space/app").main([])


def test_demo_shows_model_name_and_links_to_hub(app, tiny_pipeline, monkeypatch, tmp_path):
    served = []
    monkeypatch.setattr(app, "load_pipeline", lambda model, device: tiny_pipeline)
    monkeypatch.setattr(app, "serve", lambda demo: served.append((demo.name, demo.url)))
    monkeypatch.setattr(app.constants, "ENDPOINT", "https://hub")
    for model in ("org/ddpm-digits", tmp_path / "mine", tmp_path / "mine" / "checkpoints" / "step-000000100"):
        app.show(str(model))
    assert served == [("org/ddpm-digits", "https://hub/org/ddpm-digits"), ("mine", None), ("mine", None)]


def test_demo_of_unfinished_run(app, trained, monkeypatch, tmp_path):
    run = tmp_path / "stopped"  # has checkpoints but no exported model
    (run / "checkpoints").mkdir(parents=True)
    for checkpoint in (trained / "checkpoints").iterdir():
        (run / "checkpoints" / checkpoint.name).symlink_to(checkpoint)
    demos = []
    monkeypatch.setattr(app, "serve", demos.append)
    load_script("space/app").main(["--model", str(run)])
    *_, last = demos[0].generate(demos[0].read(0, 3, "ddpm"), 2)
    assert demos[0].name == "stopped" and last.images.shape == (2, 1, 8, 8)


def test_card_of_space_is_complete():
    _, front, _ = (SPACE / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(front)
    assert card["sdk"] == "gradio" and (SPACE / card["app_file"]).is_file()
    assert isinstance(card["python_version"], str)
    constraints = (ROOT / "constraints.txt").read_text()
    assert f"gradio=={card['sdk_version']}\n" in constraints
    assert len(card["short_description"]) <= 60  # limit of the Hub


@pytest.mark.slow
def test_uploads_and_waiting_requests_are_limited(app, tiny_pipeline, monkeypatch):
    httpx, client = pytest.importorskip("httpx"), pytest.importorskip("gradio_client")
    for name, value in {"MAX_UPLOAD": "10kb", "MAX_WAITING": 1, "MAX_RUNNING": 1}.items():
        assert getattr(app, name)  # the app has a limit
        monkeypatch.setattr(app, name, value)
    started, gate = threading.Event(), threading.Event()

    class Waiting(Demo):
        def generate(self, *inputs):
            started.set()
            assert gate.wait(LIMIT)
            return super().generate(*inputs)

    url = app.serve(Waiting(tiny_pipeline, "tiny"), prevent_thread_lock=True, quiet=True)
    try:
        sent = [
            httpx.post(f"{url}gradio_api/upload", files={"files": ("a.png", bytes(size))}).status_code
            for size in (5_000, 20_000)
        ]
        assert sent == [200, 413]
        visitor = client.Client(url, verbose=False)
        jobs = [visitor.submit(1, 0, 2, "ddpm", [], 1, api_name="/generate")]
        assert started.wait(LIMIT)
        jobs += [visitor.submit(1, 0, 2, "ddpm", [], 1, api_name="/generate") for _ in range(3)]
        futures = [job.future for job in jobs]
        refused = [future.exception() for future in islice(as_completed(futures, timeout=LIMIT), 2)]
        assert all("Queue is full" in str(error) for error in refused)
        gate.set()
        errors = [job.exception(timeout=LIMIT) for job in jobs]
        assert errors[0] is None and errors.count(None) == 2  # one running, one waiting
    finally:
        gate.set()
        app.gr.close_all()


@pytest.mark.parametrize(("options", "precision"), [([], "bf16"), (["--mixed_precision", "no"], "no")])
def test_precision_is_chosen_automatically_or_by_option(app, trained, monkeypatch, capsys, options, precision):
    served, choice = [], Choice("bf16", "precision bf16: chosen")
    monkeypatch.setattr(app, "choose_precision", lambda network, shape, batch: choice)
    monkeypatch.setattr(app, "serve", served.append)
    load_script("app").main(["--model", str(trained), *options])
    assert [demo.precision for demo in served] == [precision]
    assert capsys.readouterr().out == ("" if options else "precision bf16: chosen\n")
