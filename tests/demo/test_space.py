import asyncio
import io
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


def test_generating_answers_with_images_their_strip_and_progress(app, demo):
    answers = list(app.answer(app.generate, demo)(3, 0, 20, "ddpm", [], 1))
    *_, last = demo.generate(demo.read(0, 20, "ddpm"), 3)
    assert answers[-1][0].tobytes() == sheet(last.images).tobytes()
    assert answers[-1][1:] == (strip(last), progress_bar(last))
    assert "step 0 of 20" in answers[0][2] and "step 20 of 20" in answers[-1][2]
    shown = {picture.tobytes() for picture, _, _ in answers[:-1]}
    assert len(shown) >= 2 and answers[-1][0].tobytes() not in shown
    strips = [frames for _, frames, _ in answers if isinstance(frames, str)]
    assert len(strips) == len(set(strips)) == 8  # sent when it has changed


def test_between_seeds_are_the_images_of_these_seeds(app, demo):
    typed = (app.SEEDS, 20, 3, 4, 9, None, None, 5, "ddim", [], 1)
    answers = list(app.answer(app.interpolate, demo)(*typed))
    assert answers[0][0] == app.gr.skip() and "seed 4: step 0 of 5" in answers[0][1]
    ends = [list(demo.generate(demo.read(seed, 5, "ddim"), 1))[-1].images for seed in (4, 9)]
    *_, last = demo.interpolate(*ends, 20, 3, demo.read(4, 5, "ddim"))
    assert answers[-1] == (row([*ends[0], *last.images, *ends[1]], (8, 8)), progress_bar(last))


def test_between_uploaded_images_are_these(app, demo, tmp_path):
    for name, gray in (("black", 0), ("white", 255)):
        Image.new("L", (30, 20), gray).save(tmp_path / f"{name}.png")
    paths = [str(tmp_path / f"{name}.png") for name in ("black", "white")]
    *_, (picture, _) = app.answer(app.interpolate, demo)(app.IMAGES, 0, 2, 0, 0, *paths, 5, "ddpm", [], 1)
    ends = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 8, 8)
    *_, last = demo.interpolate(ends[:1], ends[1:], 0, 2, demo.read(0, 5, "ddpm"))
    assert picture == row([ends[0], *last.images, ends[1]], (8, 8))


def test_a_sampled_image_is_painted_on_and_filled(app, demo):
    ((background, progress),) = app.answer(app.sample_background, demo)(4, 5, "ddpm", [], 1)
    *_, sampled = demo.generate(demo.read(4, 5, "ddpm"), 1)
    assert background.size == app.canvas(demo) == (480, 480) and "step 5 of 5" in progress
    layer = Image.new("RGBA", (480, 480))
    layer.paste("red", (0, 240, 480, 480))
    # What the browser sends: files, or blobs by an id.
    editor, files = app.editor(demo), []
    for image in (background, layer):
        with io.BytesIO() as file:
            image.save(file, format="PNG")
            files.append(file.getvalue())
    editor.blob_storage["1"] = SimpleNamespace(background=files[0], layers=[None, files[1]])
    sent = SimpleNamespace(id="1", background=None, layers=[])
    drawing = editor.preprocess(sent)
    assert drawing == (files[0], [files[1]]) and editor.blob_storage == {}
    for place in range(100):
        editor.blob_storage[f"{place}"] = sent
    assert list(editor.blob_storage) == [f"{place}" for place in range(100 - app.WAITING, 100)]
    editor.blob_storage.clear()
    assert editor.preprocess(None) == editor.preprocess(sent) == (None, [])

    *_, (images, progress) = app.answer(app.inpaint, demo)(drawing, 2, 1, 0, 5, "ddpm", [], 1)
    mask = torch.arange(8).view(8, 1).expand(8, 8) >= 4
    *_, last = demo.inpaint(sampled.images, mask, 2, 1, demo.read(0, 5, "ddpm"))
    assert images.tobytes() == sheet(last.images).tobytes() and progress == progress_bar(last)
    with pytest.raises(app.gr.Error, match="image is missing: upload one, or sample one"):
        list(app.answer(app.inpaint, demo)((None, []), 2, 1, 0, 5, "ddpm", [], 1))


def test_random_seeds_are_sampled_and_shown(app, demo):
    drawing = app.draw_seeds(app.answer(app.generate, demo), [1])
    answers = [list(drawing(2, 0, 3, "ddpm", [], 1))[-1] for _ in range(2)]
    seeds = [answer[-1] for answer in answers]
    for seed, (images, *_) in zip(seeds, answers, strict=True):
        *_, last = demo.generate(demo.read(seed, 3, "ddpm"), 2)
        assert images.tobytes() == sheet(last.images).tobytes()
    assert len({0, *seeds}) == 3 and all(0 <= seed < 2**31 for seed in seeds)


async def visit(view, is_patient):
    seen = []
    async for shown in view.show():
        seen.append(shown)
        if not is_patient:
            break
    return seen


def test_the_first_view_is_sampled_once_for_all_visitors(app, demo):
    started = []

    def sample():
        started.append(1)
        return demo.generate(demo.usual, 2)

    view = app.FirstView(sample)
    assert not started  # before anybody comes
    asyncio.run(visit(view, is_patient=False))  # the first visitor leaves

    async def visit_together():
        return await asyncio.gather(*(visit(view, is_patient=True) for _ in range(3)))

    *_, last = demo.generate(demo.usual, 2)
    for seen in asyncio.run(visit_together()):
        assert seen[-1][0].tobytes() == sheet(last.images).tobytes()
        assert seen[-1][1:] == (strip(last), progress_bar(last))
    assert started == [1]


def test_the_first_view_is_what_the_form_requests(app, demo):
    values = {}
    for block in app.build(demo).blocks.values():
        if isinstance(block, app.gr.components.FormComponent):
            values.setdefault(block.label, block.value)  # the first tab comes first
    form = [values[label] for label in ("Seed", "Steps (1 to 1000)", "Sampler")]
    assert demo.usual == demo.read(*form) and demo.usual_images == values["Number of images"]


@pytest.mark.parametrize(
    ("name", "typed", "message"),
    [
        ("generate", (0, 0, 5, "ddpm", [], 1), "count=0: expected a whole number from 1 to 64"),
        ("generate", (1, 0.5, 5, "ddpm", [], 1), "seed=0.5: expected a whole number"),
        ("generate", (1, 0, 1001, "ddpm", [], 1), "steps=1001: expected a whole number from 1 to 1000"),
        ("generate", (1, 0, 5, "ddpm", ["7"], 1), "class_labels: expected None, since the network is unconditional"),
        ("interpolate", ("Two images", 5, 2, 0, 1, None, None, 5, "ddpm", [], 1), "First image is missing: upload"),
        ("interpolate", ("Two seeds", 1000, 2, 0, 1, None, None, 1, "ddpm", [], 1), "t=1000: expected a whole number"),
    ],
)
def test_what_is_typed_wrong_becomes_a_message(app, demo, name, typed, message):
    with pytest.raises(app.gr.Error, match=message):
        list(app.answer(getattr(app, name), demo)(*typed))


def test_what_is_typed_is_no_html_in_a_message(app, demo):
    with pytest.raises(app.gr.Error) as caught:
        list(app.answer(app.generate, demo)(1, 0, 5, "<img src=x onerror=alert(1)>", [], 1))
    assert "&lt;img src=x onerror=alert(1)&gt;" in caught.value.message and "<" not in caught.value.message


def test_classes_are_asked_for_where_the_model_knows_them(app, demo):
    def asked(demo):
        blocks = [block for block in app.build(demo).blocks.values() if getattr(block, "label", None)]
        names = ("Classes", "Guidance")
        return {block.label: block.value for block in blocks if block.visible and block.label.startswith(names)}

    assert asked(demo) == {}
    for embeddings, expected in ((3, [[], 1]), (2, [["cat"]])):  # where none is no class, there is no guidance
        unet = UNet2DModel(**TINY_UNET, num_class_embeds=embeddings)
        pipe = DDPMPipeline(unet, DDPMScheduler(), {"0": "cat", "1": "dog"})
        assert list(asked(Demo(pipe, "classes")).values()) == expected


def test_the_model_is_named_by_option_or_environment(app, monkeypatch, tmp_path):
    monkeypatch.delenv("MODEL_ID", raising=False)
    for missing in (None, ""):
        if missing is not None:
            monkeypatch.setenv("MODEL_ID", missing)
        with pytest.raises(ValueError, match="^--model is missing: expected a folder or Hub id, .* variable MODEL_ID$"):
            load_script("space/app").main([])
    monkeypatch.setenv("MODEL_ID", str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="nothing' cannot be loaded"):
        load_script("space/app").main([])


def test_a_model_is_shown_by_name_and_linked_on_the_hub(app, tiny_pipeline, monkeypatch, tmp_path):
    shown = []
    monkeypatch.setattr(app, "load_pipeline", lambda model, device: tiny_pipeline)
    monkeypatch.setattr(app, "serve", lambda demo: shown.append((demo.name, demo.url)))
    monkeypatch.setattr(app.constants, "ENDPOINT", "https://hub")
    for model in ("org/ddpm-digits", tmp_path / "mine", tmp_path / "mine" / "checkpoints" / "step-000000100"):
        app.show(str(model))
    assert shown == [("org/ddpm-digits", "https://hub/org/ddpm-digits"), ("mine", None), ("mine", None)]


def test_a_run_that_has_not_ended_is_shown(app, trained, monkeypatch, tmp_path):
    run = tmp_path / "stopped"  # without an export
    (run / "checkpoints").mkdir(parents=True)
    for checkpoint in (trained / "checkpoints").iterdir():
        (run / "checkpoints" / checkpoint.name).symlink_to(checkpoint)
    demos = []
    monkeypatch.setattr(app, "serve", demos.append)
    load_script("space/app").main(["--model", str(run)])
    *_, last = demos[0].generate(demos[0].read(0, 3, "ddpm"), 2)
    assert demos[0].name == "stopped" and last.images.shape == (2, 1, 8, 8)


def test_the_card_of_the_space_is_complete():
    _, front, _ = (SPACE / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(front)
    assert card["sdk"] == "gradio" and (SPACE / card["app_file"]).is_file()
    assert isinstance(card["python_version"], str)
    constraints = (ROOT / "constraints.txt").read_text()
    assert f"gradio=={card['sdk_version']}\n" in constraints
    assert len(card["short_description"]) <= 60  # what the Hub allows


@pytest.mark.slow
def test_uploads_and_waiting_requests_are_limited(app, tiny_pipeline, monkeypatch):
    httpx, client = pytest.importorskip("httpx"), pytest.importorskip("gradio_client")
    for name, value in {"UPLOAD": "10kb", "WAITING": 1, "AT_ONCE": 1}.items():
        assert getattr(app, name)  # there is a limit
        monkeypatch.setattr(app, name, value)
    started, gate = threading.Event(), threading.Event()

    class Waiting(Demo):
        def generate(self, *typed):
            started.set()
            assert gate.wait(LIMIT)
            return super().generate(*typed)

    url = app.serve(Waiting(tiny_pipeline, "tiny"), prevent_thread_lock=True, quiet=True)
    try:
        sent = [
            httpx.post(f"{url}gradio_api/upload", files={"files": ("a.png", bytes(size))}).status_code
            for size in (5_000, 20_000)
        ]
        assert sent == [200, 413]
        asker = client.Client(url, verbose=False)
        jobs = [asker.submit(1, 0, 2, "ddpm", [], 1, api_name="/generate")]
        assert started.wait(LIMIT)
        jobs += [asker.submit(1, 0, 2, "ddpm", [], 1, api_name="/generate") for _ in range(3)]
        futures = [job.future for job in jobs]
        refused = [future.exception() for future in islice(as_completed(futures, timeout=LIMIT), 2)]
        assert all("Queue is full" in str(error) for error in refused)
        gate.set()
        errors = [job.exception(timeout=LIMIT) for job in jobs]
        assert errors[0] is None and errors.count(None) == 2  # one at work, one waiting
    finally:
        gate.set()
        app.gr.close_all()


@pytest.mark.parametrize(("words", "precision"), [([], "bf16"), (["--mixed_precision", "no"], "no")])
def test_the_demo_has_the_precision_that_pays_or_is_given(app, trained, monkeypatch, capsys, words, precision):
    served, choice = [], Choice("bf16", "precision bf16: chosen")
    monkeypatch.setattr(app, "choose_precision", lambda network, shape, batch: choice)
    monkeypatch.setattr(app, "serve", served.append)
    load_script("app").main(["--model", str(trained), *words])
    assert [demo.precision for demo in served] == [precision]
    assert capsys.readouterr().out == ("" if words else "precision bf16: chosen\n")
