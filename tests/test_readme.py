import re
import shlex
from pathlib import Path

import pytest

from hf_ddpm import cli
from tests.conftest import load_script

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)

# The commands of the documents and docstrings: a script, a command of the package, the benchmark.
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = [
    file for folder in ("scripts", "hf_ddpm/cli", "hf_ddpm/demo") for file in sorted((ROOT / folder).rglob("*.py"))
]
PROGRAM = r"(?<=[ `\n])(?:scripts/[\w/]+\.py|(?:hf-ddpm|-m hf_ddpm) [a-z]\w*|-m benchmarks)(?= )"
COMMANDS = [
    command
    for file in [*DOCUMENTS, ROOT / "benchmarks" / "__main__.py", *SOURCES]
    for command in re.findall(rf"{PROGRAM} [^`\n]*--[^`\n]*", file.read_text().replace("\\\n", ""))
    if not re.search(r"\||--help|\{", command)  # alternatives, help, and templates are not commands
]


class Understood(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_the_code_of_the_readme_runs(block, trained, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "digits").symlink_to(trained)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, str(README), "exec"), {})


def find_program(command):
    """Returns the module of a command, which has `main`, and the words after it."""
    first, *words = shlex.split(command)
    if first.endswith(".py"):
        assert (ROOT / first).is_file()
        return load_script(first.removeprefix("scripts/").removesuffix(".py")), words
    if first == "-m" and words[0] == "benchmarks":
        return load_script("benchmark"), words[1:]
    words = words[1:] if first == "-m" else words
    return load_script(words[0]), words[1:]


def test_all_commands_are_said():
    programs = {find_program(command)[0].__name__ for command in COMMANDS}
    with_options = set(cli.COMMANDS) - {"presets", "status"}
    assert programs >= {*(f"hf_ddpm.cli.{name}" for name in with_options), "benchmarks.__main__"}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_that_are_said_are_understood(command, tmp_path, monkeypatch):
    program, words = find_program(command)
    for name in ("runs/digits", "runs/digits-4", "runs/digits-1", "out"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    def parsing(parse):
        def understands(*args, **kwargs):
            parse(*args, **kwargs)
            raise Understood

        return understands

    for name in ("parse_options", "parse_config", "parse_command", "parse_benchmark", "parse_distill"):
        if hasattr(program, name):
            monkeypatch.setattr(program, name, parsing(getattr(program, name)))
    with pytest.raises(Understood):
        program.main(words)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.stem)
def test_the_documents_name_files_that_are_there(document):
    for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
        assert (document.parent / target).exists(), target
