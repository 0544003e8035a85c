import re
import shlex
from pathlib import Path

import pytest

from hf_ddpm import cli
from tests.conftest import load_script

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)

# All that is said to be typed, in the documents and at the heads of the scripts.
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SAYING = [*DOCUMENTS, *sorted((ROOT / "scripts").rglob("*.py")), *sorted((ROOT / "hf_ddpm" / "cli").glob("*.py"))]
START = r"(?<=[ `\n])(?:scripts/(\w+)\.py|hf-ddpm (\w+)|-m hf_ddpm (\w+)) ([^`\n]*--[^`\n]*)"
COMMANDS = [
    (next(filter(None, names)), words)
    for file in SAYING
    for *names, words in re.findall(START, file.read_text().replace("\\\n", ""))
    if not {"|", "{", "--help"} & {*words, *words.split()}  # of alternatives or variables; which ends there
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


def test_the_commands_are_said():
    assert {name for name, _ in COMMANDS} >= {*cli.COMMANDS, "benchmark"} - {"presets"}


@pytest.mark.parametrize(("command", "words"), COMMANDS)
def test_the_commands_that_are_said_are_understood(command, words, tmp_path, monkeypatch):
    script = load_script(command)
    for name in ("runs/digits", "out"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    def parsing(parse):
        def understands(*args, **kwargs):
            parse(*args, **kwargs)
            raise Understood

        return understands

    for name in ("parse_options", "parse_config", "parse_command", "parse_benchmark"):
        if hasattr(script, name):
            monkeypatch.setattr(script, name, parsing(getattr(script, name)))
    with pytest.raises(Understood):
        script.main(shlex.split(words))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.stem)
def test_the_documents_name_files_that_are_there(document):
    for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
        assert (document.parent / target).exists(), target
