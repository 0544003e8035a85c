import json

import pytest

from tests.conftest import load_script


@pytest.fixture(scope="module")
def main():
    return load_script("reproduce").main


def test_the_data_are_those_of_the_run(main, trained, tmp_path, capsys):
    words = ["--model", str(trained), "--output", str(tmp_path), "--num_images", "2", "--samplers", "ddim"]
    assert main(["steps", *words, "--steps", "2"]) == 0
    figures = json.loads((tmp_path / "steps.json").read_text())
    assert figures["made_by"]["dataset"]["name"] == "digits" and figures["made_by"]["extractor"]["name"] == "digits"
    assert "| ddim |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "the following arguments are required: command"),
        ("step --model m", "argument command: invalid choice: 'step'"),
        ("steps", "the following arguments are required: --model"),
        ("steps --model no/such/model", "model 'no/such/model' cannot be loaded"),
        ("steps --model m --seed -1", "seed=-1 is not allowed: at least 0"),
        ("steps --model m --batch_size 0", "batch_size=0 is not allowed: at least 1"),
        ("steps --model m --steps 0", r"steps=\[0\] is not allowed: at least 1"),
        ("steps --model m --frames 3", "unknown option --frames: see --help"),
    ],
)
def test_wrong_commands_are_one_line(main, words, message):
    with pytest.raises(ValueError, match=message) as caught:
        main(words.split())
    assert "\n" not in str(caught.value)


def test_data_must_be_named_where_no_run_tells_them(main, trained, tmp_path):
    from hf_ddpm import DDPMPipeline

    DDPMPipeline.from_pretrained(trained).save_pretrained(tmp_path / "model")
    words = ["steps", "--model", str(tmp_path / "model"), "--output", str(tmp_path / "figures")]
    with pytest.raises(ValueError, match="dataset is missing: there is no config.yaml of a run in model="):
        main(words)
    assert not (tmp_path / "figures").exists()
