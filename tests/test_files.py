import json

import pytest

from hf_ddpm.files import write_text, written_whole
from hf_ddpm.lines import append_line, cut_lines, read_lines


def test_a_file_is_there_whole_or_as_it_was(tmp_path):
    file = tmp_path / "file.txt"
    write_text(file, "before")
    with pytest.raises(KeyboardInterrupt), written_whole(file) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert file.read_text() == "before" and list(tmp_path.iterdir()) == [file]
    with pytest.raises(OSError), written_whole(tmp_path / "folder") as partial:
        partial.mkdir()
        (partial / "half").touch()
        raise OSError("disk full")
    assert list(tmp_path.iterdir()) == [file]


def test_lines_are_cut_to_a_step_and_what_a_kill_has_left_is_none(tmp_path):
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
