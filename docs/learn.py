"""Run the code of ddpm-in-100-lines.md; write its pictures and the notebook of the page.

python docs/learn.py
"""

import ast
import contextlib
import io
import json
import re
from base64 import b64encode
from pathlib import Path
from typing import Any

from PIL import Image

DOCS = Path(__file__).parent
PAGE, NOTEBOOK = DOCS / "ddpm-in-100-lines.md", DOCS.parent / "notebooks" / "ddpm_in_100_lines.ipynb"
BLOCK = re.compile(r"```python\n(.*?)```\n", re.DOTALL)
PICTURE = re.compile(r"\n!\[.*?\]\((learn/.*?)\)\n")


def run(code: str, names: dict[str, Any]) -> tuple[str, Any]:
    """Run a block in a namespace; return what it prints and the value of its last line, as a notebook does."""
    tree = ast.parse(code)
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(tree, str(PAGE), "exec"), names)
        value = None if last is None else eval(compile(last, str(PAGE), "eval"), names)
    return printed.getvalue(), value


def parts(page: str) -> list[tuple[str, str]]:
    """Divide a page into its cells, in order: `markdown` or `code`, and the text."""
    texts = BLOCK.split(page)
    return [("code" if i % 2 else "markdown", text.strip("\n")) for i, text in enumerate(texts) if text.strip()]


def cell(kind: str, text: str, number: int, outputs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a cell of a notebook, format 4.5."""
    content: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}}
    content["source"] = text.splitlines(keepends=True)
    return content if kind == "markdown" else content | {"execution_count": number, "outputs": outputs}


def main() -> None:
    """Run the page; write its pictures and the notebook."""
    page = PAGE.read_text(encoding="utf-8")
    pictures = iter(PICTURE.findall(page))
    names: dict[str, Any] = {}
    cells = []
    for number, (kind, text) in enumerate(parts(page)):
        outputs = []
        if kind == "markdown":
            # A notebook shows the picture itself, below the code; links start in its own folder.
            text = re.sub(r"\]\((?!http|\.\.)(\S+?)\)", r"](../docs/\1)", PICTURE.sub("\n", text + "\n").strip("\n"))
        else:
            printed, value = run(text, names)
            print(printed, end="")
            if printed:
                outputs.append({"output_type": "stream", "name": "stdout", "text": printed.splitlines(keepends=True)})
            if isinstance(value, Image.Image):
                file = DOCS / next(pictures)
                value.save(file, optimize=True)
                data = {"image/png": b64encode(file.read_bytes()).decode()}
                outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
        if text:
            cells.append(cell(kind, text, number, outputs))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    NOTEBOOK.parent.mkdir(exist_ok=True)
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
