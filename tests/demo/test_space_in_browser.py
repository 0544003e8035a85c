"""The demo as a person sees it, in Chromium; nothing that it shows may come from elsewhere."""

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

from hf_ddpm.demo.demo import square
from hf_ddpm.images import GAP
from tests.conftest import load_script

pytestmark = [pytest.mark.browser, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update"),
]
PATIENCE = 120  # seconds: gradio alone takes ten to import


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    found = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    if not found:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=found[0], args=FLAGS)


@pytest.fixture(scope="module")
def address(trained, browser, tmp_path_factory):
    """Where the app listens, a process of its own."""
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
def page(browser, address):
    """The app, opened; no request goes elsewhere."""
    page, elsewhere = browser.new_page(viewport={"width": 1000, "height": 1000}), []

    def route(handled):
        if handled.request.url.startswith((address, "data:", "blob:")):
            handled.continue_()
        else:
            elsewhere.append(handled.request.url)
            handled.abort()

    page.route("**/*", route)
    page.set_default_timeout(1000 * PATIENCE)
    page.goto(address)
    page.get_by_role("button", name="Generate").wait_for()
    yield page
    page.close()
    assert elsewhere == []


def wait_for(page, line):
    """Waits until the progress says so."""
    page.wait_for_function(
        "line => [...document.querySelectorAll('textarea, input')].some(box => box.value === line)", arg=line
    )


def press(page, name):
    page.get_by_role("button", name=name, exact=True).locator("visible=true").click()


def download(page, place):
    """Returns a picture that is shown, as it is downloaded."""
    with page.expect_download() as download:
        page.get_by_label("Download").locator("visible=true").nth(place).click()
    return np.asarray(Image.open(download.value.path()).convert("L"))


def test_images_appear(page, trained, tmp_path):
    page.evaluate(
        """() => {
            [window.seen, window.covered] = [new Set(), false];
            const note = () => {
                window.seen.add(document.querySelector(".picture img")?.src);
                window.covered ||= !!document.querySelector(".picture [data-testid=status-tracker]:not(.hide)");
            };
            new MutationObserver(note).observe(document.body, {subtree: true, childList: true, attributes: true});
        }"""
    )
    page.get_by_label("steps").fill("60")
    page.get_by_label("seed", exact=True).fill("2")
    page.get_by_label("number input for count").locator("visible=true").fill("4")
    press(page, "Generate")
    wait_for(page, "step 60 of 60")
    page.wait_for_timeout(500)
    words = ["--num_images", "4", "--seed", "2", "--num_inference_steps", "60"]
    load_script("sample").main(["--model", str(trained), "--output", str(tmp_path), *words])
    files = [np.asarray(Image.open(path)) for path in sorted(tmp_path.glob("0*.png"))]
    np.testing.assert_array_equal(download(page, 0), square(torch.tensor(np.stack(files)).unsqueeze(1)))
    assert not page.evaluate("window.covered")  # by what is shown of a wait
    addresses = [address for address in page.evaluate("[...window.seen]") if address]
    assert len(addresses) >= 3  # two before the last: they hold a checksum
    contents = {page.request.get(address).body() for address in addresses}
    assert len(contents) == len(addresses)
    assert download(page, 1).shape == (4 * (128 + GAP) + GAP, 8 * (128 + GAP) + GAP)
    page.screenshot(path=tmp_path / "generate.png", full_page=True)


def test_two_seeds_and_two_images_are_interpolated(page, tmp_path):
    page.get_by_label("steps").fill("5")
    page.get_by_role("tab", name="Interpolate").click()
    page.get_by_label("number input for t:").fill("20")
    press(page, "Interpolate")
    wait_for(page, "step 21 of 21")
    page.wait_for_timeout(500)
    between_seeds = download(page, 0)

    page.get_by_label("two images").check()
    for place, gray in enumerate((0, 255)):
        Image.new("L", (20, 20), gray).save(tmp_path / f"{gray}.png")
        page.locator("input[type=file]").nth(place).set_input_files(tmp_path / f"{gray}.png")
    page.get_by_label("Remove Image").nth(1).wait_for()
    page.get_by_label("number input for t:").fill("10")
    press(page, "Interpolate")
    wait_for(page, "step 11 of 11")
    page.wait_for_timeout(500)
    between_images = download(page, 0)
    page.screenshot(path=tmp_path / "interpolate.png", full_page=True)
    # 11 images of 8 pixels in 1024: 11 times
    assert between_seeds.shape == between_images.shape == (88 + 2 * GAP, 11 * (88 + GAP) + GAP)
    assert (between_images[:, :88] == 0).all() and (between_images[:, -88:] == 255).all()
    assert not np.array_equal(between_seeds, between_images)


def test_what_is_typed_wrong_is_said(page, tmp_path):
    def is_said(button, message):
        press(page, button)
        page.get_by_text(re.compile(message)).first.wait_for()
        assert page.get_by_text("Traceback").count() == 0

    page.get_by_label("seed", exact=True).fill("1.5")
    is_said("Generate", "seed=1.5 is not allowed: a whole number from 0")
    page.get_by_label("steps").fill("5000")
    page.get_by_label("seed", exact=True).fill("1")
    is_said("Generate", "steps=5000 is not allowed: a whole number from 1 to 1000")
    page.get_by_label("steps").fill("5")
    page.get_by_role("tab", name="Interpolate").click()
    page.get_by_label("two images").check()
    is_said("Interpolate", "first image is not usable: there is none")
    Image.new("L", (4, 4)).save(tmp_path / "small.png")
    (tmp_path / "text.png").write_text("no picture")
    for name, reason in [
        ("small", "4x4 is smaller than resolution=8"),
        ("text", "it is no image of a known format"),
    ]:
        page.locator("input[type=file]").first.set_input_files(tmp_path / f"{name}.png")
        page.get_by_label("Remove Image").first.wait_for()
        is_said("Interpolate", f"first image is not usable: {reason}")
        page.get_by_label("Remove Image").first.click()
    page.screenshot(path=tmp_path / "wrong.png", full_page=True)


def test_a_long_request_is_stopped(page):
    page.get_by_label("steps").fill("1000")
    press(page, "Generate")
    progress = page.get_by_placeholder("progress").locator("visible=true")
    page.wait_for_function(
        "[...document.querySelectorAll('textarea, input')].some(box => /step [1-9]\\d* of 1000/.test(box.value))"
    )
    press(page, "Stop")
    page.wait_for_timeout(1000)
    stopped = progress.input_value()
    page.wait_for_timeout(2000)
    assert progress.input_value() == stopped != "step 1000 of 1000"
    page.get_by_label("steps").fill("3")
    press(page, "Generate")
    wait_for(page, "step 3 of 3")
