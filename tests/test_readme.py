import io
import re
import shlex
import shutil
import tokenize
from collections import Counter
from pathlib import Path

import pytest

from hf_ddpm import cli
from tests.conftest import load_script

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
CHINESE = ".zh-CN.md"
DOCUMENTS = [
    README, ROOT / f"README{CHINESE}", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]  # fmt: skip
TRANSLATIONS = [document for document in DOCUMENTS if document.name.endswith(CHINESE)]
OWN_TEST = {"ddpm-in-100-lines"}  # tests/test_learn.py runs their code
PROGRAMS = [
    pytest.param(document, code, id=f"{document.stem}-{number}")
    for document in DOCUMENTS
    if not document.stem.startswith(tuple(OWN_TEST))
    and document not in TRANSLATIONS  # whose code is that of the original
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
    if file.name != "CHANGELOG.md" and file not in TRANSLATIONS  # abbreviated there; those of the original
    for command in re.findall(rf"{PROGRAM} [^`\n]*--[^`\n]*", file.read_text().replace("\\\n", ""))
    if not re.search(r"\||--help|\{", command)  # alternatives, help, and templates are not commands
]


class Parsed(Exception):
    pass


def test_readme_is_one_page():
    assert len(README.read_text().split()) < 900


@pytest.mark.slow
@pytest.mark.parametrize(("document", "code"), PROGRAMS)
def test_code_of_documents_runs(document, code, trained, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    shutil.copytree(trained, tmp_path / "runs" / "digits")  # some blocks write into the folder of the model
    (tmp_path / "runs" / "digits-4").symlink_to(tmp_path / "runs" / "digits")
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
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
def test_commands_of_documents_are_parsed(command, tmp_path, monkeypatch):
    program, words = find_program(command)
    for name in ("runs/digits", "runs/digits-4", "runs/digits-1", "runs/cifar-4", "out"):
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
def test_links_of_documents_lead_to_files_and_headings(document):
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", document.read_text()):
        file = document.parent / target if target else document
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


# What a translation has in common with its original, besides its words.
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
DISPLAY = re.compile(r"^\$\$(.*?)\$\$$", re.DOTALL | re.MULTILINE)
FORMULA, SPAN, TARGET = re.compile(r"\$([^$]+)\$"), re.compile(r"`([^`]+)`"), re.compile(r"\]\(([^)]+)\)")
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
# Numbers in words. One is also an article.
ENGLISH = dict(two="2", three="3", four="4", five="5", six="6", seven="7", eight="8", nine="9", ten="10")
HAN = {"两": "2", "二": "2", "三": "3", "四": "4", "五": "5", "六": "6", "七": "7", "八": "8", "九": "9", "十": "10"}


def original(document):
    return document.with_name(document.name.replace(CHINESE, ".md"))


def translated(document, target):
    """Return the target of a link in the translation of a document: the translated page where there is one."""
    if target.endswith(CHINESE):  # the link to the other language
        return target.replace(CHINESE, ".md")
    there = target.replace(".md", CHINESE)
    return there if document.parent / there.split("#")[0] in TRANSLATIONS else target


def without_comments(code):
    """Return the tokens of a program and their places; of comments and docstrings only the numbers."""
    tokens = [(token.start, token.string) for token in tokenize.generate_tokens(io.StringIO(code).readline)]
    return [
        (start, sorted(NUMBER.findall(text)) if text.startswith(("#", '"""')) else text)
        for start, text in tokens
        if text.strip()
    ]


def take(pattern, text):
    """Return what a pattern finds, with single spaces, and the rest of the text."""
    return [" ".join(found.split()) for found in pattern.findall(text)], pattern.sub(" ", text)


def sections(document):
    """Return for each section of a document its code, formulas, links, numbers and marks."""
    text = re.sub(r"^> ?", "", document.read_text(), flags=re.MULTILINE)
    blocks = FENCED.findall(text)
    code = [(name, without_comments(block) if name == "python" else block) for name, block in blocks]
    found = [{"code": code}]
    for section in re.split(r"^(?=##)", FENCED.sub("```", text), flags=re.MULTILINE):
        display, rest = take(DISPLAY, section.replace("```", ""))
        formulas, rest = take(FORMULA, rest)
        spans, rest = take(SPAN, rest)
        targets, rest = take(TARGET, rest)
        numbers = NUMBER.findall(rest)
        numbers += [ENGLISH[word] for word in re.findall(r"\w+", rest.lower()) if word in ENGLISH]
        numbers += [HAN[sign] for sign in rest if sign in HAN]
        marks = re.findall(r"^(?:#+|\||-|!|\*(?!\*))|\*\*", rest, re.MULTILINE)
        found.append({"blocks": section.count("```"), "display": display, "formulas": Counter(formulas),
                      "code": Counter(spans), "targets": Counter(targets), "numbers": Counter(numbers),
                      "marks": Counter(marks)})  # fmt: skip
    return found


@pytest.mark.parametrize("document", TRANSLATIONS, ids=lambda document: document.stem)
def test_translations_have_code_formulas_links_and_numbers_of_original(document):
    here, there = sections(document), sections(original(document))
    assert len(here) == len(there) > 5
    for ours, theirs in zip(here, there, strict=True):
        targets = [translated(original(document), target) for target in theirs.pop("targets", Counter()).elements()]
        assert ours.pop("targets", Counter()) == Counter(targets)
        assert ours == theirs


@pytest.mark.parametrize("document", TRANSLATIONS, ids=lambda document: document.stem)
def test_languages_link_to_each_other_at_top(document):
    for file, other in ((document, original(document)), (original(document), document)):
        assert re.match(rf"# .+\n\n\[.+\]\({re.escape(other.name)}\)\n", file.read_text())


@pytest.mark.parametrize("document", TRANSLATIONS, ids=lambda document: document.stem)
def test_chinese_is_spaced_and_punctuated(document):
    """GitHub shows a formula only after a space, and a line break within a paragraph as a space between words."""
    text = DISPLAY.sub("", FENCED.sub("", document.read_text()))
    text = TARGET.sub("]", FORMULA.sub("$", SPAN.sub("`", text)))
    han, latin = r"[\u4e00-\u9fff]", r"[A-Za-z0-9`$]"
    assert not re.findall(rf".*{han}{latin}.*|.*{latin}{han}.*", text)
    assert not re.findall(rf".*{han} ?[,;:?!.()].*|.*[,;:?!.()] ?{han}.*", text)
    assert not re.findall(r".*[^\s]\$.*", text)
    assert not re.findall(r"^[^|#!>*\n-].*\n[^|#!>*\n-].*", text, re.MULTILINE)
