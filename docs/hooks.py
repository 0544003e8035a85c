"""Hooks of mkdocs: the changelog as a page, links to files outside of docs/, formulas as MathML, unbroken options."""

import html
import logging
import os
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
CHANGELOG = ROOT / "CHANGELOG.md"
LOG = logging.getLogger("mkdocs.hooks")

# In Markdown: a block of code, which is not changed, or a link.
CODE_OR_LINK = re.compile(
    r"(^```.*?^```)|(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)#\s]+)(#[^)\s]*)?\)", re.DOTALL | re.MULTILINE
)
# In HTML: an option in the text, not inside a tag; a formula.
OPTION = re.compile(r"(?<![\w-])--\w+(?=[^<>]*<)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add CHANGELOG.md as changelog.md."""
    text = re.sub(r"\]\((?!https?:|#)", "](../", CHANGELOG.read_text(encoding="utf-8"))
    files.append(File.generated(config, "changelog.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links that leave docs/: to the repository if `repo_url` is set, else to plain text."""
    docs = Path(config.docs_dir)
    folder = (docs / page.file.src_uri).parent

    def rewrite(match: re.Match[str]) -> str:
        code, label, target, anchor = match.groups()
        if code or re.match(r"https?:|mailto:", target):
            return match[0]
        file = Path(os.path.normpath(folder / target))
        if file == CHANGELOG:
            return f"[{label}]({os.path.relpath(docs / 'changelog.md', folder)}{anchor or ''})"
        if file.is_relative_to(docs) and file != docs:
            return f"[{label}]({os.path.relpath(file, folder)}{anchor or ''})"
        if not file.exists():
            LOG.warning(f"{page.file.src_uri}: no such file: {target}")
        if config.repo_url:
            return f"[{label}]({config.repo_url.rstrip('/')}/blob/main/{file.relative_to(ROOT)}{anchor or ''})"
        return label

    return CODE_OR_LINK.sub(rewrite, markdown)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Convert formulas to MathML, which browsers display without scripts; keep lines from breaking inside options."""

    def formula(match: re.Match[str]) -> str:
        latex = re.sub(r"\\tag\{(.*?)\}", r"\\qquad (\1)", html.unescape(match[2]))
        return convert(latex, display="inline" if match[1] == "span" else "block")

    return OPTION.sub(r'<span class="option">\g<0></span>', FORMULA.sub(formula, content))
