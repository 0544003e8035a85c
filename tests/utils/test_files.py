import errno
import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from hf_ddpm.images import save_picture
from hf_ddpm.utils.files import atomic_write, make_folder, write_text
from hf_ddpm.utils.jsonl import append_line, cut_lines, read_lines, to_json


def test_file_is_written_completely_or_not_at_all(tmp_path):
    file = tmp_path / "file.txt"
    write_text(file, "before")
    with pytest.raises(KeyboardInterrupt), atomic_write(file) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert file.read_text() == "before" and list(tmp_path.iterdir()) == [file]
    with pytest.raises(OSError), atomic_write(tmp_path / "folder") as partial:
        partial.mkdir()
        (partial / "half").touch()
        raise OSError("disk full")
    assert list(tmp_path.iterdir()) == [file]


def test_lines_of_later_steps_and_incomplete_lines_are_removed(tmp_path):
    file = tmp_path / "lines.jsonl"
    assert read_lines(file) == []
    cut_lines(file, 3)
    assert not file.exists()
    for step in (1, 2, 3):
        append_line(file, {"step": step, "loss": 0.5})
    with file.open("a") as torn:
        torn.write('{"step": 4, "lo')
    assert [line["step"] for line in read_lines(file)] == [1, 2, 3]
    append_line(file, {"step": 5})
    append_line(file, {"step": None})
    assert [line["step"] for line in read_lines(file)] == [1, 2, 3, 5, None]
    cut_lines(file, 2)
    assert file.read_text() == "".join(json.dumps({"step": step, "loss": 0.5}) + "\n" for step in (1, 2))


def test_invalid_bytes_affect_only_their_line(tmp_path):
    file = tmp_path / "lines.jsonl"
    for step in (1, 2, 3):
        append_line(file, {"step": step})
    broken = file.read_bytes().replace(b'{"step": 2}', b'{"st\xffp": 2}')
    file.write_bytes(broken + b'[3]\n{"step": NaN}\n\x00\n' + b"[" * 100_000 + b"\n")
    assert read_lines(file) == [{"step": 1}, {"step": 3}]
    cut_lines(file, 3)
    assert file.read_text() == '{"step": 1}\n{"step": 3}\n'


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_rejected(tmp_path, value):
    file = tmp_path / "lines.jsonl"
    append_line(file, {"step": 1})
    with pytest.raises(FloatingPointError, match=rf"fd\.value is {value}"):
        append_line(file, {"step": 2, "fd": {"value": value}})
    assert file.read_text() == '{"step": 1}\n'
    with pytest.raises(FloatingPointError, match=rf"terms\[1\] is {value}"):
        to_json({"terms": (0.5, value)})


@pytest.fixture
def trace(monkeypatch):
    """Record flushes and renames in order."""
    calls, fsync, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (calls.append(("fsync", os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd))
    )
    monkeypatch.setattr(Path, "replace", lambda a, b: (calls.append(("rename", str(b))), replace(a, b))[1])
    return calls


def test_contents_are_flushed_before_rename_and_rename_before_end(tmp_path, trace):
    save_picture(Image.new("L", (2, 2)), tmp_path / "a.png")
    partial = str(tmp_path / ".a.png.partial")
    assert trace == [("fsync", partial), ("rename", str(tmp_path / "a.png")), ("fsync", str(tmp_path))]
    trace.clear()
    with atomic_write(tmp_path / "model") as folder:
        (folder / "unet").mkdir(parents=True)
        (folder / "unet" / "weights").write_text("1")
    before = [path for kind, path in trace[: trace.index(("rename", str(tmp_path / "model")))] if kind == "fsync"]
    assert before == [str(path) for path in (folder / "unet" / "weights", folder / "unet", folder)]
    assert trace[-1] == ("fsync", str(tmp_path))


def test_errors_of_full_disk_name_file(tmp_path):
    full = Path("/dev/full")
    for write in (
        lambda path: path.symlink_to(full) or path.write_text("x" * 100_000),
        lambda path: save_file({"a": torch.zeros(10)}, path / "no" / "folder"),
    ):
        with pytest.raises(OSError, match=rf"^{tmp_path}/file: file cannot be written: ") as caught:
            with atomic_write(tmp_path / "file") as partial:
                write(partial)
        assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
    (tmp_path / "lines.jsonl").symlink_to(full)
    with pytest.raises(OSError, match="lines.jsonl: file cannot be written: No space left on device") as caught:
        append_line(tmp_path / "lines.jsonl", {"step": 1})
    assert caught.value.errno == errno.ENOSPC


def test_error_for_unwritable_folder_names_its_option(tmp_path):
    make_folder(tmp_path / "a" / "b", "output")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--output .*file/c: folder is not writable: Not a directory"):
        make_folder(tmp_path / "file" / "c", "output")
