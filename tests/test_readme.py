import re
import shlex
import shutil
from pathlib import Path

import pytest

from hf_ddpm import cli
from tests.conftest import load_script

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
OWN_TEST = {"ddpm-in-100-lines"}  # tests/test_learn.py runs their code
PROGRAMS = [
    pytest.param(document, code, id=f"{document.stem}-{number}")
    for document in DOCUMENTS
    if not document.stem.startswith(tuple(OWN_TEST))
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", document.read_text(), flags=re.DOTALL))
]

# The commands of the documents and docstrings: a script, a command of the package, the benchmark.
SOURCES = [
    file for folder in ("scripts", "hf_ddpm/cli", "hf_ddpm/demo") for file in sorted((ROOT / folder).rglob("*.py"))
]
PROGRAM = r"(?<=[ `\n])(?:scripts/[\w/]+\.py|(?:hf-ddpm|-m hf_ddpm) [a-z]\w*|-m benchmarks)(?= )"
COMMANDS = [
    command
    for file in [*DOCUMENTS, ROOT / "benchmarks" / "__main__.py", *SOURCES]
    if file.name != "CHANGELOG.md"  # which abbreviates them
    for command in re.findall(rf"{PROGRAM} [^`\n]*--[^`\n]*", file.read_text().replace("\\\n", ""))
    if not re.search(r"\||--help|\{", command)  # alternatives, help, and templates are not commands
]


class Parsed(Exception):
    pass


def test_readme_is_one_page():
    assert len(README.read_text().split()) < 900


@pytest.mark.slow
@pytest.mark.parametrize(("document", "code"), PROGRAMS)
def test_code_of_the_documents_runs(document, code, trained, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    shutil.copytree(trained, tmp_path / "runs" / "digits")  # some blocks write into the folder of the model
    (tmp_path / "runs" / "digits-4").symlink_to(tmp_path / "runs" / "digits")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(document), "exec"), {})


def find_program(command):
    """Return the module of a command, which has `main`, and its arguments."""
    first, *words = shlex.split(command)
    if first.endswith(".py"):
        assert (ROOT / first).is_file()
        return load_script(first.removeprefix("scripts/").removesuffix(".py")), words
    if first == "-m" and words[0] == "benchmarks":
        return load_script("benchmark"), words[1:]
    words = words[1:] if first == "-m" else words
    return load_script(words[0]), words[1:]


def test_documents_show_every_command():
    programs = {find_program(command)[0].__name__ for command in COMMANDS}
    with_options = set(cli.COMMANDS) - {"presets", "status"}
    assert programs >= {*(f"hf_ddpm.cli.{name}" for name in with_options), "benchmarks.__main__"}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_documents_are_parsed(command, tmp_path, monkeypatch):
    program, words = find_program(command)
    for name in ("runs/digits", "runs/digits-4", "runs/digits-1", "out"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    def parsing(parse):
        def parses(*args, **kwargs):
            parse(*args, **kwargs)
            raise Parsed

        return parses

    for name in ("parse_options", "parse_config", "parse_command", "parse_benchmark", "parse_distill"):
        if hasattr(program, name):
            monkeypatch.setattr(program, name, parsing(getattr(program, name)))
    with pytest.raises(Parsed):
        program.main(words)


def anchors(file):
    """Return the anchors of a Markdown file's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", file.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.stem)
def test_links_of_the_documents_lead_to_files_and_headings(document):
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", document.read_text()):
        file = document.parent / target if target else document
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"
