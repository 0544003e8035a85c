"""The demo in Chromium, without any requests to other servers."""

import base64
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_ddpm import DDPMPipeline
from hf_ddpm.demo.demo import Demo
from hf_ddpm.demo.layout import sheet
from tests.conftest import load_script

pytestmark = [pytest.mark.browser, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update"),
]
PATIENCE = 120  # time limit in seconds; importing gradio takes ten
DESKTOP, PHONE = (1280, 800), (390, 844)


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    paths = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    if not paths:
        pytest.skip("Chromium is not installed")
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=paths[0], args=FLAGS)


@pytest.fixture(scope="module")
def address(trained, browser, tmp_path_factory):
    """URL of the app, which runs in a separate process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("app") / "log.txt"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GRADIO_SERVER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "scripts" / "space" / "app.py"), "--model", str(trained)]
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(2 * PATIENCE):
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(url)
                break
            except urllib.error.URLError:
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def page(browser, address, request):
    """A page with the app, in a window of a given size; asserts that there are no external requests."""
    width, height = getattr(request, "param", DESKTOP)
    page, external = browser.new_page(viewport={"width": width, "height": height}), []

    def route(handled):
        if handled.request.url.startswith((address, "data:", "blob:")):
            handled.continue_()
        else:
            external.append(handled.request.url)
            handled.abort()

    page.route("**/*", route)
    page.set_default_timeout(1000 * PATIENCE)
    page.goto(address)
    page.get_by_role("button", name="Generate").wait_for()
    yield page
    page.close()
    assert external == []


def wait_for(page, pattern):
    """Wait until the text of the visible progress bar, without the time, matches a pattern."""
    page.wait_for_function(
        """pattern => [...document.querySelectorAll('.progress')].some(
            line => line.offsetParent && RegExp('^' + pattern + '(, [0-9.]+ s)?$').test(line.innerText.trim()))""",
        arg=pattern,
    )


def last_line(page):
    """Wait until the progress stops, and return its text without the time."""
    line = page.evaluate(
        """async () => {
            const read = () => [...document.querySelectorAll('.progress')].find(one => one.offsetParent).innerText;
            let [line, since] = [read(), performance.now()];
            while (performance.now() - since < 2000) {
                await new Promise(requestAnimationFrame);
                if (line !== read()) [line, since] = [read(), performance.now()];
            }
            return line.trim();
        }"""
    )
    return line.split(",")[0]


def press(page, name):
    page.get_by_role("button", name=name, exact=True).locator("visible=true").click()


def fill(page, label, value):
    page.get_by_label(label, exact=True).locator("visible=true").fill(str(value))


def download(page):
    """Download the visible grid of images, and return its pixels."""
    with page.expect_download() as download:
        page.get_by_label("Download").locator("visible=true").click()
    return np.asarray(Image.open(download.value.path()).convert("L"))


def boxes(page, selector):
    """Return left, top, right and bottom of the visible elements of a selector, in pixels."""
    return page.evaluate(
        """selector => [...document.querySelectorAll(selector)].filter(one => one.offsetParent).map(one => {
            const box = one.getBoundingClientRect(); return [box.left, box.top, box.right, box.bottom]})""",
        selector,
    )


def check_layout(page, result, rows):
    """Assert that result and buttons are visible without scrolling, and that the strip wraps into `rows` rows."""
    width, height = page.viewport_size["width"], page.viewport_size["height"]
    page.evaluate("scrollTo(0, 0)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for selector in (result, ".progress", ".buttons button"):
        visible = boxes(page, selector)
        assert visible, selector
        for left, top, right, bottom in visible:
            assert 0 <= left and right <= width and 0 <= top and bottom <= height, selector
    strip = boxes(page, ".strip figure")
    assert len({round(top) for _, top, _, _ in strip}) == rows
    assert all(0 <= left and right <= width and right - left > 60 for left, _, right, _ in strip)
    assert len({round(top) for _, top, _, _ in boxes(page, ".buttons button")}) == 1


@pytest.mark.parametrize("page", [DESKTOP, PHONE], indirect=True)
def test_images_are_sampled_on_load(page, trained, tmp_path):
    wait_for(page, "step 50 of 50")
    options = ["--num_images", "16", "--num_inference_steps", "50"]
    load_script("sample").main(["--model", str(trained), "--output", str(tmp_path), *options])
    files = [np.asarray(Image.open(path)) for path in sorted(tmp_path.glob("0*.png"))]
    np.testing.assert_array_equal(download(page), sheet(torch.tensor(np.stack(files)).unsqueeze(1)))
    check_layout(page, ".picture img", rows=2)
    assert page.locator(".strip img").locator("visible=true").count() == 8
    assert len({round(left) for left, *_ in boxes(page, ".strip img")}) == 4  # both rows are full
    assert page.get_by_text("removes the noise step by step").is_visible()
    page.screenshot(path=tmp_path / "generate.png", full_page=True)


def test_images_are_updated_during_sampling(page, trained, tmp_path):
    wait_for(page, "step 50 of 50")
    page.evaluate(
        """() => {
            [window.seen, window.bars, window.covered] = [new Set(), new Set(), false];
            const note = () => {
                window.seen.add(document.querySelector(".picture img")?.src);
                window.bars.add(document.querySelector(".progress progress")?.position);
                window.covered ||= !!document.querySelector(".picture [data-testid=status-tracker]:not(.hide)");
            };
            new MutationObserver(note).observe(document.body, {subtree: true, childList: true, attributes: true});
        }"""
    )
    fill(page, "Steps (1 to 1000)", 60)
    fill(page, "Seed", 2)
    page.get_by_label("number input for Number of images").locator("visible=true").fill("4")
    press(page, "Generate")
    wait_for(page, "step 60 of 60")
    np.testing.assert_array_equal(download(page), expected_sheet(trained, seed=2, steps=60, count=4))
    assert not page.evaluate("window.covered")  # by a status overlay
    assert {0, 1} < set(page.evaluate("[...window.bars]"))  # the progress bar moves
    urls = [url for url in page.evaluate("[...window.seen]") if url]
    assert len(urls) >= 3  # the result and at least two previews; a URL contains a checksum
    contents = {page.request.get(url).body() for url in urls}
    assert len(contents) == len(urls)


def expected_sheet(model, seed, steps, count=16):
    demo = Demo(DDPMPipeline.from_pretrained(model), "model")
    *_, last = demo.generate(demo.read(seed, steps, "ddpm"), count)
    return np.asarray(sheet(last.images))


def test_random_seed_is_shown_with_its_images(page, trained):
    seed = page.get_by_label("Seed", exact=True).locator("visible=true")
    fill(page, "Steps (1 to 1000)", 7)
    press(page, "Random seed")
    wait_for(page, "step 7 of 7")
    first = int(seed.input_value())
    np.testing.assert_array_equal(download(page), expected_sheet(trained, first, 7))
    # After a second press during sampling, the seed still matches the images.
    fill(page, "Steps (1 to 1000)", 500)
    press(page, "Random seed")
    wait_for(page, r"step [1-9]\d* of 500")
    press(page, "Random seed")
    wait_for(page, "step 500 of 500")
    second = int(seed.input_value())
    np.testing.assert_array_equal(download(page), expected_sheet(trained, second, 500))
    assert len({0, first, second}) == 3


def test_each_start_button_cancels_other(page, trained):
    for former, latter in (("Random seed", "Generate"), ("Generate", "Random seed")):
        fill(page, "Steps (1 to 1000)", 1000)
        press(page, former)
        wait_for(page, r"step [1-9]\d* of 1000")
        fill(page, "Steps (1 to 1000)", 8)
        press(page, latter)
        wait_for(page, "step 8 of 8")
        assert last_line(page) == "step 8 of 8"
        seed = int(page.get_by_label("Seed", exact=True).locator("visible=true").input_value())
        np.testing.assert_array_equal(download(page), expected_sheet(trained, seed, 8))


def visible_pictures(page):
    """Return the pictures of the visible strip."""
    sources = page.evaluate(
        "[...document.querySelectorAll('.strip img')].filter(one => one.offsetParent).map(one => one.src)"
    )
    files = [io.BytesIO(base64.b64decode(source.partition(",")[2])) for source in sources]
    return [np.asarray(Image.open(file)) for file in files]


@pytest.mark.parametrize(("page", "rows"), [(DESKTOP, 1), (PHONE, 3)], indirect=["page"])
def test_interpolation_between_two_seeds_and_two_images(page, rows, tmp_path):
    page.get_by_role("tab", name="Interpolate").click()
    check_layout(page, ".strip .blank", rows)  # placeholders of the result
    page.get_by_label("number input for Noise").fill("20")
    fill(page, "Steps (at most t + 1)", 5)
    press(page, "Interpolate")
    wait_for(page, "step 5 of 5")
    page.wait_for_function("[...document.querySelectorAll('.strip img')].filter(one => one.offsetParent).length == 11")
    between_seeds = visible_pictures(page)
    check_layout(page, ".strip img", rows)
    page.screenshot(path=tmp_path / "seeds.png", full_page=True)

    page.get_by_label("Two images").check()
    for place, gray in enumerate((0, 255)):
        Image.new("L", (20, 20), gray).save(tmp_path / f"{gray}.png")
        page.locator("input[type=file]").nth(place).set_input_files(tmp_path / f"{gray}.png")
    page.get_by_label("Remove Image").nth(1).wait_for()
    page.get_by_label("number input for Noise").fill("10")
    fill(page, "Steps (at most t + 1)", 50)
    press(page, "Interpolate")
    wait_for(page, "step 11 of 11")  # t + 1
    between_images = visible_pictures(page)
    page.screenshot(path=tmp_path / "images.png", full_page=True)
    assert len(between_seeds) == len(between_images) == 11
    inside = np.s_[10:-10, 10:-10]  # without the gap around an image
    assert (between_images[0][inside] == 0).all() and (between_images[-1][inside] == 255).all()
    assert not any(map(np.array_equal, between_seeds, between_images))


@pytest.mark.parametrize("page", [DESKTOP, PHONE], indirect=True)
def test_painted_area_is_filled(page, trained, tmp_path):
    page.get_by_role("tab", name="Inpaint").click()
    press(page, "Inpaint")
    page.get_by_text("image is missing: upload or sample an image").first.wait_for()
    fill(page, "Steps (1 to 1000)", 5)
    press(page, "Sample an image")
    wait_for(page, "step 5 of 5")
    page.locator(".editor").get_by_label("Brush", exact=True).click()
    left, top, right, bottom = boxes(page, ".editor canvas")[0]
    page.mouse.move((left + right) / 2, (top + bottom) / 2)
    page.mouse.down()
    page.mouse.move((left + right) / 2 + 20, (top + bottom) / 2, steps=10)
    page.mouse.up()
    press(page, "Inpaint")
    # The stroke reaches the server with a delay; until then, the page shows "nothing is painted".
    page.wait_for_function("[...document.querySelectorAll('.picture img')].some(one => one.offsetParent)")
    wait_for(page, "step 21 of 21")
    page.screenshot(path=tmp_path / "inpaint.png", full_page=True)
    grid = download(page)
    scale = 768 // 16
    tiles = [grid[6 + y * (8 * scale + 6) :, 6 + x * (8 * scale + 6) :][: 8 * scale : scale, : 8 * scale : scale]
             for y in (0, 1) for x in (0, 1)]  # fmt: skip
    demo = Demo(DDPMPipeline.from_pretrained(trained), "model")
    *_, sampled = demo.generate(demo.read(0, 5, "ddpm"), 1)
    is_kept = np.all([tile == tiles[0] for tile in tiles], axis=0)
    assert is_kept[[0, -1]].all() and is_kept[:, [0, -1]].all() and not is_kept[3:5, 3:5].any()
    # The browser blends the border of the canvas with its background.
    assert np.abs(tiles[0].astype(int) - sampled.images[0, 0].numpy())[is_kept].max() <= 8


def test_invalid_input_shows_message(page, tmp_path):
    def expect_message(button, message):
        press(page, button)
        page.get_by_text(re.compile(message)).first.wait_for()
        assert page.get_by_text("Traceback").count() == 0

    fill(page, "Seed", 1.5)
    expect_message("Generate", "seed=1.5: expected a whole number from 0")
    fill(page, "Steps (1 to 1000)", 5000)
    fill(page, "Seed", 1)
    expect_message("Generate", "steps=5000: expected a whole number from 1 to 1000")
    page.get_by_role("tab", name="Interpolate").click()
    page.get_by_label("Two images").check()
    expect_message("Interpolate", "First image is missing: upload an image")
    Image.new("L", (4, 4)).save(tmp_path / "small.png")
    (tmp_path / "text.png").write_text("no picture")
    for name, reason in [("small", "size 4x4 is smaller than the resolution 8x8"), ("text", "unknown image format")]:
        page.locator("input[type=file]").first.set_input_files(tmp_path / f"{name}.png")
        page.get_by_label("Remove Image").first.wait_for()
        expect_message("Interpolate", f"First image: {reason}")
        page.get_by_label("Remove Image").first.click()
    page.screenshot(path=tmp_path / "wrong.png", full_page=True)


def test_stop_button_ends_long_request(page):
    fill(page, "Steps (1 to 1000)", 1000)
    press(page, "Generate")
    wait_for(page, r"step [1-9]\d* of 1000")
    press(page, "Stop")
    line = last_line(page)
    assert re.fullmatch(r"step \d+ of 1000", line) and line != "step 1000 of 1000"
    fill(page, "Steps (1 to 1000)", 3)
    press(page, "Generate")
    wait_for(page, "step 3 of 3")
