import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from contextlib import closing
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from hf_ddpm.data.streaming import stream as module
from hf_ddpm.data.streaming import windows
from tests.conftest import LIMIT
from tests.data.files import numbered, parquet, png, shards
from tests.data.files import stream as open_stream

OPTIONS = {"seed": 0, "batch_size": 12, "workers": 0}
ALL = slice(0, 12)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(module, "LANES", 4)
    monkeypatch.setattr(module, "WINDOW_ROWS", 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(shards(tmp_path_factory.mktemp("stream") / "data", [numbered(i) for i in range(97)]))


def stream(name, **options):
    return closing(open_stream(name, **(OPTIONS | options)))


def values(batch):
    assert batch.images.dtype == torch.uint8 and batch.images.shape[1:] == (1, 8, 8)
    return batch.images[:, 0, 3, 3].tolist()


def digest(batch):
    return hashlib.sha256(batch.images.numpy().tobytes() + batch.labels.numpy().tobytes()).hexdigest()


def test_each_epoch_has_every_image_once_in_another_order(folder):
    with stream(folder) as source:
        assert len(source) == 97
        seen = [value for step in range(25) for value in values(source.batch(step, ALL))]
    epochs = [seen[epoch * 97 : (epoch + 1) * 97] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(97)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    with stream(folder, seed=1) as other:
        assert values(other.batch(0, ALL)) != seen[:12]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_number_of_processes_or_on_resuming(folder, workers):
    with stream(folder, class_column="auto") as alone:
        expected = [digest(alone.batch(step, ALL)) for step in range(20)]
    with (
        stream(folder, class_column="auto", workers=workers) as first,
        stream(folder, class_column="auto", workers=workers) as second,
    ):
        for step in range(20):
            parts = [source.batch(step, rows) for source, rows in ((first, slice(0, 5)), (second, slice(5, 12)))]
            whole = type(parts[0])(
                *(torch.cat([getattr(part, name) for part in parts]) for name in ("images", "labels"))
            )
            assert digest(whole) == expected[step]
    with stream(folder, class_column="auto", workers=workers) as resumed:
        assert [digest(resumed.batch(step, ALL)) for step in (17, 18, 19)] == expected[17:]
        assert [digest(resumed.batch(step, ALL)) for step in (4, 4, 9)] == [expected[4], expected[4], expected[9]]


def test_labels_match_their_images(folder):
    with stream(folder, class_column="label") as source:
        assert source.class_names == ("a", "b", "c")
        for step in range(9):
            batch = source.batch(step, ALL)
            assert batch.labels.dtype == torch.int64
            assert batch.labels.tolist() == [value % 3 for value in values(batch)]


def test_classes_without_names_are_values_of_column(tmp_path):
    features = Features({"image": Image(), "kind": Value("string")})
    data = Dataset.from_dict({"image": [numbered(i) for i in range(9)], "kind": list("zyxzyxzyx")}, features)
    data.to_parquet(str(tmp_path / "a.parquet"))
    with stream(str(tmp_path / "a.parquet"), class_column="kind") as source:
        assert source.class_names == ("x", "y", "z")
        batch = source.batch(0, ALL)
        assert batch.labels.tolist() == [2 - value % 3 for value in values(batch)]


def test_crops_of_streams_depend_only_on_seed_step_and_row(tmp_path):
    wide = np.tile(np.arange(20, dtype=np.uint8), (8, 1))
    folder = str(shards(tmp_path / "wide", [png(wide)] * 24))
    with stream(folder, crop="random") as source, stream(folder, crop="random", workers=1) as other:
        first = [source.batch(step, ALL).images for step in range(10)]
        assert torch.equal(other.batch(6, slice(4, 9)).images, first[6][4:9])
    left = torch.cat(first)[:, 0, 0, 0]
    assert set(left.tolist()) == set(range(13))


def with_bad_images(images, bad):
    return [{"bytes": b"nothing", "path": f"{i}.png"} if i in bad else image for i, image in enumerate(images)]


def test_error_for_bad_image_names_file_and_row(tmp_path):
    folder = str(shards(tmp_path / "data", with_bad_images([numbered(i) for i in range(24)], {13})))
    with stream(folder) as source, pytest.raises(ValueError) as caught:
        for step in range(2):
            source.batch(step, ALL)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("row 1 (") and "train-00002-of-00004.parquet)" in message
    assert "not an image of a known format; use --skip_bad_images true" in message


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_images_are_reported_and_replaced_in_same_way_on_all_processes(tmp_path, workers):
    folder = str(shards(tmp_path / "data", with_bad_images([numbered(i) for i in range(48)], {13, 22, 40})))
    report = tmp_path / "report.jsonl"
    options = {"skip_bad_images": True, "class_column": "label"}
    with stream(folder, **options, report=report, workers=workers) as source:
        batches = [source.batch(step, ALL) for step in range(4)]
        seen = [value for batch in batches for value in values(batch)]
        assert [label for batch in batches for label in batch.labels.tolist()] == [value % 3 for value in seen]
        assert source.skipped == 3
    good = set(range(48)) - {13, 22, 40}
    assert len(seen) == 48 and set(seen) == good  # all good images, three of them twice
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert sorted((Path(line["file"]).name[6:11], line["row"]) for line in lines) == [
        ("00001", 1), ("00001", 10), ("00003", 4)]  # fmt: skip
    with stream(folder, **options, report=report) as again:  # as after a kill
        for step in range(4):
            again.batch(step, ALL)
        assert again.skipped == 3 and len(report.read_text().splitlines()) == 3
    with stream(folder, **options) as first, stream(folder, **options) as second:
        for step, batch in enumerate(batches):
            assert digest(first.batch(step, slice(0, 12))) == digest(batch)
            assert torch.equal(second.batch(step, slice(7, 12)).images, batch.images[7:])


def test_stream_of_only_bad_images_is_rejected(tmp_path):
    folder = str(shards(tmp_path / "data", with_bad_images([None] * 24, set(range(24)))))
    message = r"all images read together are unusable \(\d+\); row \d+ of '.*parquet'"
    with stream(folder, skip_bad_images=True) as source, pytest.raises(ValueError, match=message):
        source.batch(0, ALL)


def test_error_for_damaged_file_names_it(tmp_path):
    folder = shards(tmp_path / "data", [numbered(i) for i in range(24)])
    torn = folder / "train-00002-of-00004.parquet"
    content = torn.read_bytes()
    torn.write_bytes(content[:4] + b"\xff" * 200 + content[204:])  # damages the rows, not the footer
    with stream(str(folder)) as source, pytest.raises(ValueError, match="row group 0 of .*00002-of-.*: cannot be read"):
        for step in range(2):
            source.batch(step, ALL)
    torn.write_bytes(content[:-20])
    with pytest.raises(ValueError, match="00002-of-00004.parquet': cannot be read as parquet"):
        open_stream(folder, **OPTIONS)


def test_error_for_data_that_cannot_be_streamed_names_it(tmp_path, folder):
    PILImage.new("L", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a.png' cannot be streamed; expected parquet files"):
        open_stream(tmp_path, **OPTIONS)
    with pytest.raises(ValueError, match="no split 'test'; expected one of train"):
        open_stream(folder, split="test", **OPTIONS)
    with pytest.raises(ValueError, match="--dataset .*nowhere: cannot be streamed"):
        open_stream(str(tmp_path / "nowhere"), **OPTIONS)
    with pytest.raises(ValueError, match="--image_column picture: there is no such column"):
        open_stream(folder, image_column="picture", **OPTIONS)


def test_files_with_other_columns_or_without_rows_are_rejected(tmp_path):
    folder = shards(tmp_path / "data", [numbered(i) for i in range(8)], files=2)
    parquet(folder / "train-00002-of-00003.parquet", image=[numbered(8)])
    message = "00002-of-00003.parquet': columns differ from the columns of '.*00000-of-00002.parquet'"
    with pytest.raises(ValueError, match=message):
        open_stream(folder, **OPTIONS)
    Dataset.from_dict({"image": []}, Features({"image": Image()})).to_parquet(str(tmp_path / "empty.parquet"))
    with pytest.raises(ValueError, match="empty.parquet': contains no images"):
        open_stream(tmp_path / "empty.parquet", **OPTIONS)


def test_limited_stream_uses_random_groups(folder):
    with stream(folder, max_train_samples=23) as source:
        assert len(source) == 23
        seen = [value for step in range(4) for value in values(source.batch(step, ALL))]
    assert len(set(seen[:23])) == 23 and set(seen[:23]) == set(seen[23:46]) and set(seen[:23]) != set(range(23))


class Ranges(SimpleHTTPRequestHandler):
    """Serve byte ranges of files."""

    def do_GET(self):
        content = Path(self.translate_path(self.path)).read_bytes()
        part = self.headers.get("Range")
        start, stop = (int(x) for x in part.removeprefix("bytes=").split("-")) if part else (0, len(content) - 1)
        self.send_response(206 if part else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Range", f"bytes {start}-{stop}/{len(content)}")
        body = content[start : stop + 1]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_files_are_streamed_over_http(folder):
    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: Ranges(*args, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/train-00001-of-00004.parquet"
        with stream(url) as source:
            seen = [value for step in range(2) for value in values(source.batch(step, ALL))]
    finally:
        server.shutdown()
        server.server_close()
    assert sorted(seen) == list(range(25, 49))


def test_closing_ends_all_processes_and_threads(folder):
    before = threading.active_count()
    source = open_stream(folder, **(OPTIONS | {"workers": 2}))
    source.batch(0, ALL)
    assert len(multiprocessing.active_children()) >= 2
    source.close()
    deadline = time.monotonic() + LIMIT
    while (multiprocessing.active_children() or threading.active_count() > before) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children() and threading.active_count() <= before


def test_stream_does_not_change_global_generator(folder):
    state = torch.get_rng_state()
    with stream(folder) as source:
        source.batch(0, ALL)
    assert torch.equal(torch.get_rng_state(), state)


def test_memory_use_is_bounded(tmp_path, monkeypatch):
    """Count the encoded rows in memory, which is less noisy than the memory use of the process."""
    alive = []
    held = []

    class Counted(windows.LoadedWindow):
        def __init__(self, *columns):
            super().__init__(*columns)
            alive.append(len(self.images))

        def __del__(self):
            alive.remove(len(self.images))

    monkeypatch.setattr(windows, "LoadedWindow", Counted)
    folder = str(shards(tmp_path / "data", [numbered(i % 256) for i in range(1200)], files=4, group=5))
    monkeypatch.setattr(module, "WINDOW_ROWS", 10)
    with stream(folder) as source:
        for step in range(300):  # three epochs
            source.batch(step, ALL)
            held.append(sum(alive))
    # 2 windows of 10 to 14 rows for each of 4 lanes, and the windows of the last batch.
    assert max(held) <= 4 * 4 * 15
    assert max(held[200:]) <= max(held[:100]) + 30


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc to find processes")
def test_workers_exit_when_parent_is_killed(tmp_path):
    # With large images, a worker is usually killed in the middle of sending a message.
    data = shards(tmp_path / "data", [numbered(i, size=256) for i in range(64)])
    code = f"""
from hf_ddpm.config import DataConfig
from hf_ddpm.data.streaming.stream import open_stream
stream = open_stream(DataConfig({str(data)!r}, resolution=[256]), seed=0, batch_size=32, workers=2)
for step in range(1000):
    stream.batch(step, slice(0, 32))
    print(step, flush=True)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": "."}
    )
    parent.stdout.readline()
    workers = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    assert len(workers) == 2
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + LIMIT
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, "workers are still alive"
        time.sleep(0.05)
