import ast
import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [file for folder in ("hf_ddpm", "benchmarks") for file in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("file", [file for file in FILES if ">>> " in file.read_text()], ids=lambda file: file.stem)
def test_examples_are_correct(file):
    module = importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
    failed, tried = doctest.testmod(module)
    assert tried and not failed


def documented(file):
    """Yield the name, the Args section and the arguments of each function and class whose docstring has Args."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and "Args:\n" in (ast.get_docstring(node) or ""):
            functions = [part for part in getattr(node, "body", []) if getattr(part, "name", None) == "__init__"]
            function = functions[0] if functions else node
            if isinstance(function, ast.FunctionDef):  # otherwise a dataclass
                yield node.name, ast.get_docstring(node).split("Args:\n")[1].split("\n\n")[0], function.args


def test_docstrings_list_all_arguments_in_order():
    count = 0
    for file in FILES:
        for name, section, arguments in documented(file):
            every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            more = [argument for argument in (arguments.vararg, arguments.kwarg) if argument is not None]
            in_order = sorted([*every, *more], key=lambda argument: (argument.lineno, argument.col_offset))
            names = [argument.arg for argument in in_order if argument.arg not in ("self", "cls")]
            listed = [
                word for line in re.findall(r"^ {4}\*{0,2}(\w[\w, ]*):", section, re.M) for word in line.split(", ")
            ]
            if arguments.kwarg is not None:  # its options may be listed one by one
                names = [name for name in names if name != arguments.kwarg.arg]
                listed = [word for word in listed if word in names]
            assert listed == names, f"{file.relative_to(ROOT)}: {name}"
            count += 1
    assert count > 100
