import json

import pytest

from hf_ddpm.paper.study import Subject, table


def test_numbers_are_right_of_their_columns():
    expected = "| a | b | c |\n| --- | ---: | ---: |\n| x | 1 | 0.3333 |\n| y | 10000 | 1.235e+05 |"
    assert table(["a", "b", "c"], [["x", 1, 1 / 3], ["y", 10000, 123456.7]]) == expected


def test_the_data_of_a_run_are_known_and_may_be_others(trained, model):
    known = Subject(str(trained))
    assert known.floor and not Subject(str(trained), floor=False).floor
    assert (known.dataset, known.levels, known.image_column) == ("digits", 17, None)
    other = Subject(str(trained), dataset="mine", image_column="picture")
    assert (other.dataset, other.levels, other.image_column) == ("mine", None, "picture")
    assert Subject(model).dataset is None


def test_diffusion_steps_are_quarters_by_default(study):
    assert study.diffused([]) == [5, 10, 15, 20] and study.diffused([9, 3, 9]) == [3, 9]
    for wrong in (0, 21):
        with pytest.raises(ValueError, match=rf"diffused=\[{wrong}\] is not allowed: 1 to 20"):
            study.diffused([wrong])


def test_a_figure_says_what_it_is_of(study):
    study.write("name", "Title", "Words.", {"value": 1}, {"option": 2}, {"dataset": "d"})
    assert (study.folder / "name.md").read_text() == "## Title\n\nWords.\n"
    written = json.loads((study.folder / "name.json").read_text())
    assert written["value"] == 1 and written["made_by"]["options"] == {"option": 2}
    assert written["made_by"]["dataset"] == "d" and written["made_by"]["seed"] == 0
    assert written["model"]["name"] == study.subject.model and set(written["made_by"]["versions"]) >= {
        "torch",
        "hf_ddpm",
    }


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="a file stands there, a folder is wanted"):
        Subject("m", output=str(tmp_path / "file"))
