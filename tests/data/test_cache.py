"""The cache of decoded images: its key, killed processes and concurrent processes."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from hf_ddpm.data import decoding
from tests.conftest import LIMIT
from tests.data.files import load, numbered, parquet, write_images


@pytest.fixture
def decoded(monkeypatch):
    """Return a function that returns the number of images decoded since its last call."""
    counts = [0]
    real = decoding._decode_rows

    def counting(batch, indices, **options):
        counts[0] += len(indices)
        return real(batch, indices, **options)

    monkeypatch.setattr(decoding, "_decode_rows", counting)

    def since():
        count, counts[0] = counts[0], 0
        return count

    return since


def test_images_are_decoded_once_per_format(tmp_path, decoded):
    folder = str(write_images(tmp_path / "images", count=3, size=(12, 9)))
    rgb, gray = {"resolution": 8, "channels": 3}, {"resolution": 8, "channels": 1}
    ways = [rgb, gray, rgb | {"resolution": 9}, rgb | {"resolution": (8, 12)}, rgb | {"crop": "random"},
            rgb | {"max_train_samples": 2}, gray | {"levels": 65536}, rgb | {"background": "blue"}]  # fmt: skip
    first = []
    for way in ways:
        images = load(folder, **way)
        assert decoded() == way.get("max_train_samples", 3)
        first.append(images[torch.arange(2)])
    for way, expected in zip(ways, first, strict=True):
        assert torch.equal(load(folder, **way)[torch.arange(2)].float(), expected.float())
        # The number of 8-bit levels does not change the decoded pixels.
        load(folder, **({"levels": 17} | way))
    assert decoded() == 0


def test_changed_file_is_decoded_again(tmp_path, decoded):
    folder = write_images(tmp_path / "images", count=3)
    load(folder)
    PILImage.new("L", (8, 8), 77).save(folder / "1.png")
    images = load(folder)
    assert decoded() == 6 and bool((images[torch.tensor([1])] == 77).all())
    (folder / "2.png").unlink()
    assert len(load(folder)) == 2


def start(file, **environment):
    """Start a process that decodes the images of a file and prints a checksum."""
    code = f"""
import hashlib, torch
from hf_ddpm.config import DataConfig
from hf_ddpm.data.store import load_images
images = load_images(DataConfig({file!r}, resolution=[64]))
print(len(images), hashlib.sha256(images[torch.arange(len(images))].numpy().tobytes()).hexdigest())
"""
    return subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    rng = np.random.default_rng(0)
    images = [numbered(int(value), size=256, format="JPEG") for value in rng.integers(0, 256, 1500)]
    return parquet(tmp_path_factory.mktemp("many") / "a.parquet", image=images)


@pytest.fixture(scope="module")
def whole(many, tmp_path_factory):
    out, _ = start(many, HF_HOME=str(tmp_path_factory.mktemp("whole"))).communicate()
    assert out.startswith(b"1500 ")
    return out


@pytest.mark.slow
def test_kill_while_decoding_leaves_no_partial_cache(many, whole, tmp_path):
    home = tmp_path / "home"
    process = start(many, HF_HOME=str(home))
    deadline = time.monotonic() + LIMIT
    # datasets writes to a temporary file and renames it at the end.
    while not any(path.stat().st_size > 2**20 for path in home.rglob("tmp*")) and time.monotonic() < deadline:
        assert process.poll() is None, "the process ended before it was killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(home.rglob("cache-*.arrow"))
    out, error = start(many, HF_HOME=str(home)).communicate()
    assert out == whole, error


@pytest.mark.slow
def test_two_concurrent_processes_get_same_images(many, whole, tmp_path):
    both = [start(many, HF_HOME=str(tmp_path)) for _ in range(2)]
    for process in both:
        out, error = process.communicate()
        assert out == whole, error
