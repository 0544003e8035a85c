from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import pytest

from hf_ddpm.config import PARTS, Config, EvaluationConfig, parse_config
from hf_ddpm.evaluation.options import EvaluateConfig
from hf_ddpm.paper.options import FigureOptions
from hf_ddpm.sampling.options import SampleConfig, Sampling
from hf_ddpm.utils.options import option, parse_command, parse_first, parse_options


@dataclass
class Common:
    """Common options."""

    seed: int = option("a seed", 0)


@dataclass
class Draw:
    """Draws.

    A second paragraph.
    """

    size: int = option("a size", 1)


@dataclass
class Count:
    """Counts."""

    upto: int = option("how far")


COMMANDS = {"draw-all": (Common, Draw), "count": (Common, Count)}


def test_args_file_next_to_script_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "draw.args").write_text("--size 7")
    monkeypatch.setattr("sys.argv", [str(tmp_path / "draw.py")])
    assert parse_options([], Draw) == [Draw(1)] and parse_first([], Draw)[0] == Draw(1)


def test_command_is_parsed_with_its_own_options():
    assert parse_command(["draw-all", "--size", "3"], COMMANDS) == ("draw-all", [Common(0), Draw(3)])
    assert parse_command(["count", "--upto", "3", "--seed", "1"], COMMANDS) == ("count", [Common(1), Count(3)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "^command is missing; expected one of draw-all, count; see --help$"),
        ("--size 3 draw-all", "unknown command '--size': expected one of draw-all, count"),
        ("drawall", "unknown command 'drawall': did you mean draw-all?"),
        ("draw-all --upto 3", "unknown option --upto: see --help"),
        ("draw-all --sice 3", "unknown option --sice: did you mean --size?"),
        ("count", "^--upto is missing; expected "),
    ],
)
def test_invalid_command_is_one_line(words, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_command(words.split(), COMMANDS)
    assert "\n" not in str(caught.value)


def test_help_names_commands_and_then_options(capsys):
    for words, expected in [(["--help"], "draw-all              Draws.\n"), (["count", "--help"], "--upto N")]:
        with pytest.raises(SystemExit):
            parse_command(words, COMMANDS)
        assert expected in capsys.readouterr().out


@pytest.mark.parametrize("part", [*PARTS, Sampling, EvaluateConfig, FigureOptions])
def test_floats_of_every_option_are_finite(part):
    required = [f"--{f.name}=x" for f in fields(part) if f.default is MISSING and f.default_factory is MISSING]
    floats = [f.name for f in fields(part) if "float" in str(f.type)]
    for name in floats:
        for text in ("nan", "inf", "-inf", "1e999"):
            with pytest.raises(ValueError, match=f"^--{name} {text}: expected a finite number$"):
                parse_options([*required, f"--{name}={text}"], part)


@pytest.mark.parametrize("text", ["", " "])
def test_empty_text_is_rejected_unless_it_is_default(text):
    for words in (["--output", text, "--model", "m"], ["--model", text, "--output", "o"]):
        with pytest.raises(ValueError, match=f"^{words[0]} '{text}': expected a text that is not empty$"):
            parse_options(words, FigureOptions)
    with pytest.raises(ValueError, match="^--eval_split '"):
        parse_options(["--eval_split", text], EvaluationConfig)
    assert parse_options(["--eval_metrics", ""], EvaluationConfig)[0].eval_metrics == ""


def test_number_beyond_63_bits_is_rejected():
    assert parse_options(["--size", str(2**63 - 1)], Draw) == [Draw(2**63 - 1)]
    for value in (2**63, -(2**63)):
        with pytest.raises(ValueError, match=f"^--size {value}: expected an integer of at most 63 bits$"):
            parse_options([f"--size={value}"], Draw)


@pytest.mark.parametrize("words", [["--no-ema_warmup=false"], ["--no-ema_warmup=true"], ["--no_eval_floor=x"]])
def test_no_prefix_takes_no_value(words):
    with pytest.raises(ValueError, match=rf"^{words[0]}: expected --no_\w+ without a value"):
        parse_config(["--preset", "digits", *words])


def test_negative_numbers_in_scientific_notation_are_values():
    assert parse_config(["--preset", "digits", "--value_range", "-1e-3", "1"]).data.value_range == [-1e-3, 1]
    assert Config.of(preset="digits", value_range=[-1e-05, 1]).data.value_range == [-1e-05, 1]


def test_no_prefix_switches_option_off_and_unexpected_arguments_are_rejected():
    assert not parse_config(["--preset", "digits", "--no-streaming"]).data.streaming
    with pytest.raises(ValueError, match="unexpected argument 'x': expected"):
        parse_config(["x"])
    with pytest.raises(ValueError, match="unexpected argument '0' after --value_range=1: expected"):
        parse_config(["--preset", "digits", "--value_range=1", "0"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sampling(num_inference_steps="3"), "num_inference_steps='3': expected int or null"),
        (lambda: Sampling(scheduler="foo"), "scheduler='foo': expected one of 'ddpm'"),
        (lambda: SampleConfig("m", "o", format="gif"), "format='gif': expected one of 'png', 'npz'"),
        (lambda: SampleConfig(None, "o"), "model=None: expected text"),
        (lambda: EvaluateConfig(model=3), "model=3: expected text or null"),
    ],
)
def test_types_of_options_given_in_python_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()
    assert SampleConfig(Path("m"), Path("o")).model == "m"


def test_option_without_value_is_rejected():
    for argv in (["--size"], ["--size", "--size", "1"]):
        with pytest.raises(ValueError, match="^--size: expected a value$"):
            parse_options(argv, Draw)
    with pytest.raises(ValueError, match="^--value_range: expected a value$"):
        parse_config(["--preset", "digits", "--value_range"])
