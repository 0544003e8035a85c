"""Draws docs/architecture.svg and updates docs/architecture.md from the files and imports of the package.

    python docs/architecture.py

The layers are those of the import contract in setup.cfg; the lines of the module map are the first lines of the
docstrings; the walks are written by hand, except for their links.
"""

import ast
import re
from configparser import ConfigParser
from html import escape
from pathlib import Path
from textwrap import wrap

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hf_ddpm"
PICTURE, PAGE = ROOT / "docs" / "architecture.svg", ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- map: written by docs/architecture.py -->\n", "<!-- end of the map -->"

# A line of a walk: number, link to a file, the function or class in it.
WALK = re.compile(r"^(\d+\. )\[([^\]]*)\]\([^)]*\) `([\w.]+)`", re.MULTILINE)

# In pixels: the picture, the boxes of rooms, the space between boxes, lanes of arrows, space of rows, lines of text.
WIDTH, BOX, GAP, LANE, ROW_GAP, LINE = 860, 190, 18, 26, 44, 15
COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17807e", "#8c564b", "#c2185b", "#5f6b7a", "#a08500")

# A node of a row: a room, or a bundle of arrows on their way to (room, row).
Node = str | tuple[str, int]


def room_of(file: Path) -> str:
    """Returns the room of a file: a folder of the package, or the file itself at the root."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def read_layers() -> list[list[str]]:
    """Returns the rooms of each layer, from the top, as the import contract lists them."""
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg")
    lines = settings["importlinter:contract:layers"]["layers"].split("\n")
    layers = [[name.strip().removeprefix("hf_ddpm.") for name in line.split("|")] for line in lines if line]
    return [rooms for layer in layers if (rooms := [name for name in layer if name != "benchmarks"])]


def modules() -> dict[str, Path]:
    """Returns the modules of the package by dotted name: the files in folders with an `__init__.py`."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        if (file.parent / "__init__.py").exists():
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports() -> set[tuple[str, str]]:
    """Returns (room, imported room); imports in functions and modules named in strings, such as commands, count."""
    names, rooms = modules(), {room for layer in read_layers() for room in layer}
    pairs = set()
    for file in names.values():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        typing_only = {
            part
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for part in ast.walk(node)
        }
        for node in ast.walk(tree):
            imported: list[str] = []
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Constant) and node.value in names:
                imported = [node.value]
            if node not in typing_only:
                pairs |= {(room_of(file), name.split(".")[1]) for name in imported if name in names and "." in name}
    pairs = {(room, other) for room, other in pairs if room != other and not room.startswith("__")}
    unknown = {room for pair in pairs for room in pair} - rooms
    if unknown:
        raise ValueError(f"setup.cfg: the layers lack {', '.join(sorted(unknown))}")
    return pairs


def reduce_arrows(pairs: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Returns the arrows that are not implied by others: a -> c goes where a -> b -> ... -> c stays."""
    below: dict[str, set[str]] = {}

    def reach(room: str) -> set[str]:
        if room not in below:
            below[room] = set()
            for _, other in sorted(pair for pair in pairs if pair[0] == room):
                below[room] |= {other} | reach(other)
        return below[room]

    return {(a, c) for a, c in pairs if not any(c in reach(b) for other, b in pairs if other == a and b != c)}


def arrange(layers: list[list[str]], arrows: set[tuple[str, str]]) -> tuple[list[list[Node]], set[tuple[Node, Node]]]:
    """Orders the rooms of each row so that few arrows cross.

    Returns:
        The nodes of each row, with a lane for arrows that pass between the rooms, and the links of adjacent rows.
    """
    row_of = {room: index for index, layer in enumerate(layers) for room in layer}
    rows: list[list[Node]] = [list(layer) for layer in layers]
    links: set[tuple[Node, Node]] = set()
    for start, end in sorted(arrows):
        nodes: list[Node] = [start, *((end, row) for row in range(row_of[start] + 1, row_of[end])), end]
        for node in nodes[1:-1]:
            if node not in rows[node[1]]:  # type: ignore[index]
                rows[node[1]].append(node)  # type: ignore[index]
        links |= set(zip(nodes, nodes[1:], strict=False))

    def crossings() -> int:
        place = {node: index for row in rows for index, node in enumerate(row)}
        lines = [[(place[a], place[b]) for a, b in links if a in row] for row in rows]
        return sum((a - c) * (b - d) < 0 for line in lines for a, b in line for c, d in line)

    best = crossings(), [list(row) for row in rows]
    for sweep in range(24):
        for row in rows if sweep % 2 else rows[::-1]:
            place = {node: (index + 0.5) / len(other) for other in rows for index, node in enumerate(other)}
            side = 1 if sweep % 2 else 0  # neighbors above on the way down, below on the way up
            near = {node: [link[1 - side] for link in links if link[side] == node] for node in row}
            row.sort(key=lambda n: sum(place[m] for m in near[n]) / len(near[n]) if near[n] else place[n])
        best = min(best, (crossings(), [list(row) for row in rows]), key=lambda found: found[0])
    return best[1], links


def place(rows: list[list[Node]], links: set[tuple[Node, Node]]) -> dict[Node, float]:
    """Returns the horizontal center of each node: near its neighbors, without overlap, inside the picture."""

    def width(node: Node) -> int:
        return BOX if isinstance(node, str) else LANE

    x: dict[Node, float] = {}
    for row in rows:
        left = (WIDTH - sum(map(width, row)) - GAP * (len(row) - 1)) / 2
        for node in row:
            x[node] = left + width(node) / 2
            left += width(node) + GAP
    for sweep in range(60):
        for row in rows if sweep % 2 else rows[::-1]:
            near = {node: [b if a == node else a for a, b in links if node in (a, b)] for node in row}
            for index in sorted(range(len(row)), key=lambda i: width(row[i])):
                node = row[index]
                before = [width(other) + GAP for other in row[:index]]
                after = [width(other) + GAP for other in row[index + 1 :]]
                low, high = GAP + sum(before) + width(node) / 2, WIDTH - GAP - sum(after) - width(node) / 2
                if index:
                    low = max(low, x[row[index - 1]] + (width(row[index - 1]) + width(node)) / 2 + GAP)
                if index < len(row) - 1:
                    high = min(high, x[row[index + 1]] - (width(row[index + 1]) + width(node)) / 2 - GAP)
                wanted = sum(x[other] for other in near[node]) / len(near[node]) if near[node] else WIDTH / 2
                x[node] = round(min(max(wanted, low), max(low, high)), 1)
    return x


def draw() -> str:
    """Returns the picture: rooms with their modules, and an arrow from each room to those that it imports."""
    layers, pairs = read_layers(), imports()
    rows, links = arrange(layers, reduce_arrows(pairs))
    x = place(rows, links)
    inside: dict[str, list[str]] = {}
    for name, file in modules().items():
        parts = name.split(".")[1:]
        if parts and not (len(parts) == 1 and file.name == "__init__.py"):
            word = f"{parts[1]}/" if len(parts) > 2 or (len(parts) == 2 and file.name == "__init__.py") else parts[-1]
            if len(parts) > 1 and word not in inside.setdefault(parts[0], []):
                inside[parts[0]].append(word)
    rooms = [room for layer in layers for room in layer]
    text = {room: wrap(", ".join(inside.get(room, [])), 28, break_on_hyphens=False) for room in rooms}
    boxes, top = [], GAP
    edges: dict[Node, tuple[float, ...]] = {}  # top and bottom of the row, and of the box
    for row in rows:
        height = max(_height(text[node]) for node in row if isinstance(node, str))
        for node in row:
            own = _height(text[node]) if isinstance(node, str) else height
            edges[node] = top, top + height, top + (height - own) / 2, top + (height + own) / 2
            if isinstance(node, str):
                boxes.append(_box(node, x[node], edges[node], text[node], sorted(b for a, b in pairs if a == node)))
        top += height + ROW_GAP
    lines = [_line(a, b, x, edges, COLORS[rooms.index(_target(b)) % len(COLORS)]) for a, b in sorted(links, key=str)]
    height = top - ROW_GAP + GAP
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
            'font-family="Helvetica, Arial, DejaVu Sans, sans-serif">',
            "<title>The rooms of hf_ddpm; arrows are imports</title>",
            f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
            *lines,
            *boxes,
            "</svg>\n",
        ]
    )


def write_map() -> str:
    """Returns the module map: for each room, from the top, its purpose and a line per file."""
    order = ["__init__", "__main__", *(room for layer in read_layers() for room in layer)]
    files = sorted(PACKAGE.rglob("*.py"), key=lambda file: (order.index(room_of(file)), file.parent != PACKAGE, file))
    lines = ["| | |", "| --- | --- |"]
    for file in files:
        tree, name = ast.parse(file.read_text(encoding="utf-8")), str(file.relative_to(PACKAGE))
        said = re.sub(r"\s+", " ", (ast.get_docstring(tree) or "").split("\n\n")[0])
        said = said.replace("|", "\\|").replace(":math:`", "`")
        if file.name == "__init__.py" and file.parent != PACKAGE:
            name = f"{file.parent.relative_to(PACKAGE)}/"
            said = f"**{said}**" if file.parent.parent == PACKAGE else said
        label = f"**{name}**" if file.parent == PACKAGE or name.count("/") == 1 and name.endswith("/") else name
        lines.append(f"| [{label}](../hf_ddpm/{name}) | {said} |")
    return "\n".join([*lines, ""])


def definitions() -> dict[str, list[str]]:
    """Returns the files, as paths in the package, of each function, class and method (as Class.method)."""
    found: dict[str, list[str]] = {}
    for file in modules().values():
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                methods = [part.name for part in getattr(node, "body", []) if isinstance(part, ast.FunctionDef)]
                for name in (node.name, *(f"{node.name}.{method}" for method in methods)):
                    found.setdefault(name, []).append(str(file.relative_to(PACKAGE)))
    return found


def write_page(page: str) -> str:
    """Returns the page with the map and the links of the walks as of today."""
    start, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    files = definitions()

    def link(line: re.Match[str]) -> str:
        number, written, name = line.groups()
        found = files.get(name, [])
        if written not in found and len(found) != 1:
            raise ValueError(f"docs/architecture.md: {name} of a walk is in {found or 'no file'}")
        file = written if written in found else found[0]
        return f"{number}[{file}](../hf_ddpm/{file}) `{name}`"

    return WALK.sub(link, page[:start]) + write_map() + WALK.sub(link, page[end:])


def _target(node: Node) -> str:
    return node if isinstance(node, str) else node[0]


def _height(text: list[str]) -> int:
    return LINE * len(text) + 34


def _box(room: str, x: float, edges: tuple[float, ...], text: list[str], imported: list[str]) -> str:
    top, height = edges[2], _height(text)
    words = [
        f'<text x="{x:g}" y="{top + 41 + LINE * index:g}" font-size="12" fill="#444">{escape(line)}</text>'
        for index, line in enumerate(text)
    ]
    return "\n".join(
        [
            f'<g text-anchor="middle"><title>{room} imports: {", ".join(imported) or "none"}</title>',
            f'<rect x="{x - BOX / 2:g}" y="{top:g}" width="{BOX}" height="{height}" rx="6" fill="#f6f8fa" '
            'stroke="#57606a"/>',
            f'<text x="{x:g}" y="{top + 22:g}" font-size="15" font-weight="bold" fill="#1f2328">{room}</text>',
            *words,
            "</g>",
        ]
    )


def _line(a: Node, b: Node, x: dict[Node, float], edges: dict[Node, tuple[float, ...]], color: str) -> str:
    """Returns the link of adjacent rows: into the box with a head, or through the lane if it goes on."""
    start, end, bend = edges[a][1], edges[b][0], ROW_GAP / 2
    head, stop = "", edges[b][1]
    if isinstance(b, str):
        stop = edges[b][2] - 7
        head = f'<path d="M {x[b] - 4:g} {stop:g} h 8 l -4 7 z" fill="{color}"/>'
    end = min(end, stop)
    curve = f"C {x[a]:g} {start + bend:g} {x[b]:g} {end - bend:g} {x[b]:g} {end:g}"
    path = f"M {x[a]:g} {edges[a][3]:g} V {start:g} {curve} V {stop:g}"
    return f'<path d="{path}" fill="none" stroke="{color}" stroke-width="1.6"/>{head}'


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
    PAGE.write_text(write_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
