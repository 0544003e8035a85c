from itertools import pairwise

import pytest

from hf_ddpm.utils.markdown import code, escape, plain

# Possible names of classes, datasets and models: folders may have almost any name.
HOSTILE = [
    "a|b", r"a\|b", "back`tick", "``two``", "```", "*bold*", "__init__", "_i_", "snake_case", "[text](http://e.org)",
    "![picture](x.png)", "<script>alert(1)</script>", "<!-- hidden", "&lt;", "http://e.org", "www.e.org", "$x$",
    "~~s~~", "# heading #", "line\nbreak", "a\r\n## Heading", "---", "a\n---\nb: c", "{{ 7 * 7 }}", "{% raw %}",
    "'", '"', "\\", "n\x00ul\x1b[31m", "a\u2028b", "\u202eabc", "ünïcode 猫", " spaces  inside ", "- item", "1. item",
    "> quote", "yes", "1e3",
]  # fmt: skip


def parse(text):
    """Return the tokens of Markdown as GitHub and the Hub parse it."""
    markdown_it = pytest.importorskip("markdown_it")
    return markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)


def cells(text):
    """Return the rows of the tables in a text, each cell as its visible text; other content fails."""
    rows = []
    for before, token in pairwise(parse(text)):
        if before.type == "tr_open":
            rows.append([])
        if before.type in ("td_open", "th_open"):
            assert {child.type for child in token.children} <= {"text", "code_inline"}, token.content
            rows[-1].append("".join(child.content for child in token.children))
    return rows


@pytest.mark.parametrize("name", HOSTILE)
def test_name_is_rendered_unchanged_everywhere(name):
    (_, row) = cells(f"| a | b | c |\n| --- | --- | --- |\n| {escape(name)} | {code(name)} | x, {escape(name)} |")
    assert row == [plain(name), plain(name), f"x, {plain(name)}"]
    opening, inline, closing, *more = parse(f"# x {escape(name)} y")
    assert opening.type == "heading_open" and inline.content and not more
    assert [child.type for child in inline.children] == ["text"]
    assert inline.children[0].content == f"x {plain(name)} y"


def test_plain_returns_one_line_and_keeps_characters():
    assert plain("a\r\n\tb\u2029c\x07 ") == "a b c" and plain("Zoë 🐱 👩‍🚀 a|b") == "Zoë 🐱 👩‍🚀 a|b"


def test_usual_names_are_not_escaped():
    for name in ("cat, dog", "fixed_large", "uoft-cs/cifar10", "cpu (x86_64, threads: 1)", "torch 2.13.0+cpu"):
        assert escape(name) == name
    assert code("acme/faces") == "`acme/faces`"
