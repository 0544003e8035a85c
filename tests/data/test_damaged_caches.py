"""Damaged caches are rebuilt, and the error for a full disk names its folder."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
import torch

from hf_ddpm.data.caching import explain_full_disk, is_full
from tests.data.files import load, numbered, parquet
from tests.data.test_kinds import image, pack, saved


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", folder / "downloads")
    return folder


def values(name, lines):
    images = load(name, log=lines.append)
    return images[torch.arange(len(images))][:, 0, 0, 0].tolist()


def last_batch(path):
    """Return the offset of the last record batch of an arrow file; a file truncated there reads without an error."""
    with pa.memory_map(str(path)) as file:
        reader = pa.ipc.open_stream(file)
        at = file.tell()
        for _ in reader:
            at, end = file.tell(), at
    return end


CUTS = {
    "half": lambda path: path.stat().st_size // 2,
    "the last bytes": lambda path: path.stat().st_size - 20,
    "all": lambda path: 0,
    "a batch": last_batch,
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("kind", ["parquet", "zip"])
@pytest.mark.parametrize("which", ["source", "decoded"])
def test_truncated_caches_are_logged_and_rebuilt(tmp_path, cache, kind, which, cut):
    grays = list(range(1, 251)) * 2
    if kind == "parquet":
        name = parquet(tmp_path / "a.parquet", image=[numbered(gray) for gray in grays])
    else:
        name = pack(tmp_path / "a.zip", {f"{i:03d}.png": image(gray) for i, gray in enumerate(grays)})
    lines = []
    assert values(name, lines) == grays
    (file,) = [path for path in cache.rglob("*.arrow") if path.name.startswith("cache-") == (which == "decoded")]
    os.truncate(file, cut(file))
    lines.clear()
    assert values(name, lines) == grays
    logged = [line for line in lines if "was damaged: rebuilding it" in line]
    assert logged and str(file if which == "decoded" else file.parent) in logged[0]
    lines.clear()
    assert values(name, lines) == grays and not any("damaged" in line for line in lines)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_damaged_description_of_cache_is_rebuilt(tmp_path, cache, text):
    name = parquet(tmp_path / "a.parquet", image=[numbered(number) for number in (1, 2)])
    assert values(name, []) == [1, 2]
    (info,) = cache.rglob("dataset_info.json")
    info.write_text(text)
    for path in cache.rglob("*.arrow"):
        path.unlink()
    lines = []
    assert values(name, lines) == [1, 2]
    assert any("was damaged" in line for line in lines)


def test_only_caches_are_removed(tmp_path, cache):
    kept = cache / "of_a_user"
    saved([1, 2]).save_to_disk(kept)
    (data,) = kept.glob("*.arrow")
    os.truncate(data, 10)
    name = parquet(tmp_path / "a.parquet", image=[numbered(number) for number in (1, 2)])
    assert values(name, []) == [1, 2]
    (file,) = [path for path in cache.rglob("parquet-*.arrow")]
    os.truncate(file, 10)
    assert values(name, []) == [1, 2] and data.exists()


def test_damaged_source_does_not_count_as_damaged_cache(tmp_path, cache):
    name = parquet(tmp_path / "a.parquet", image=[numbered(1)])
    Path(name).write_bytes(Path(name).read_bytes()[:100])
    lines = []
    with pytest.raises(ValueError, match=r"a\.parquet: cannot be read: "):
        values(name, lines)
    assert lines == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_error_for_full_disk_names_folder_and_remedy(cache, number):
    for cause in (OSError(number, os.strerror(number)), OSError("Not enough disk space. Needed: 3 GB")):
        with (
            pytest.raises(OSError, match=r"^cache .*: the disk is full; .*HF_DATASETS_CACHE or HF_HOME") as caught,
            explain_full_disk(),
        ):
            try:
                raise cause
            except OSError as error:
                raise RuntimeError("generation failed") from error
        assert "\n" not in str(caught.value) and str(cache) in str(caught.value)
    assert not is_full(OSError(errno.EACCES, "no"))


@pytest.mark.slow
def test_error_for_full_disk_is_one_line(tmp_path):
    name = parquet(tmp_path / "a.parquet", image=[numbered(number % 256, size=64) for number in range(300)])
    code = f"""
from hf_ddpm.config import DataConfig
from hf_ddpm.data.store import load_images
from hf_ddpm.utils.launch import run_script
run_script(lambda argv: load_images(DataConfig({name!r}, resolution=[64])) and 0)
"""
    home = str(tmp_path / "home")

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"HF_HOME": home},
        capture_output=True,
        text=True,
        preexec_fn=limit,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and f"{home}/datasets" in last and "the disk is full; free some space, or set" in last
    assert "Traceback" not in done.stderr
