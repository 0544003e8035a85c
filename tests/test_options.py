from dataclasses import dataclass

import pytest

from hf_ddpm.options import option, parse_command, parse_first, parse_options


@dataclass
class Common:
    """What all have."""

    seed: int = option("a seed", 0)


@dataclass
class Draw:
    """Draws.

    More of it.
    """

    size: int = option("a size", 1)


@dataclass
class Count:
    """Counts."""

    upto: int = option("how far")


COMMANDS = {"draw-all": (Common, Draw), "count": (Common, Count)}


def test_a_file_beside_the_script_is_not_read_without_being_named(tmp_path, monkeypatch):
    (tmp_path / "draw.args").write_text("--size 7")
    monkeypatch.setattr("sys.argv", [str(tmp_path / "draw.py")])
    assert parse_options([], Draw) == [Draw(1)] and parse_first([], Draw)[0] == Draw(1)


def test_a_command_is_read_with_its_own_options():
    assert parse_command(["draw-all", "--size", "3"], COMMANDS) == ("draw-all", [Common(0), Draw(3)])
    assert parse_command(["count", "--upto", "3", "--seed", "1"], COMMANDS) == ("count", [Common(1), Count(3)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "the following arguments are required: command"),
        ("--size 3 draw-all", "the following arguments are required: command"),
        ("drawall", r"argument command: invalid choice: 'drawall' \(choose from '?draw-all'?, '?count'?\)"),
        ("draw-all --upto 3", "unknown option --upto: see --help"),
        ("draw-all --sice 3", "unknown option --sice: did you mean --size?"),
        ("count", "the following arguments are required: --upto"),
    ],
)
def test_what_is_no_command_is_one_line(words, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_command(words.split(), COMMANDS)
    assert "\n" not in str(caught.value)


def test_help_names_commands_and_then_options(capsys):
    for words, expected in [(["--help"], "draw-all              Draws.\n"), (["count", "--help"], "--upto UPTO")]:
        with pytest.raises(SystemExit):
            parse_command(words, COMMANDS)
        assert expected in capsys.readouterr().out
