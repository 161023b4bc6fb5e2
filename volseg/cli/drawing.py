"""A network drawn with the characters of a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from volseg.networks.layout import Layout, arrange, name_stride
from volseg.networks.structure import Structure

WIDTH = 80
"""Columns of the terminal."""
SIGNS = {"add": "+", "cat": "c"}
WORDS = {"add": "sum", "cat": "concatenation"}


def wrap(text: str, indent: int) -> list[str]:
    """Break into lines; all but the first are indented."""
    return textwrap.wrap(text, WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False)


def draw(structure: Structure) -> list[str]:
    """Lines of a drawing: resolutions below each other, the way through the network to the right.

    What lines cannot show is said below.
    """
    layout = arrange(structure)
    labels = _label_blocks(structure)
    lines = _draw_rows(structure, layout, labels)
    if max(map(len, lines)) > WIDTH:
        lines = _list_rows(structure, layout, labels)
    return [*lines, *_say_hidden(structure, layout)]


def _draw_rows(structure: Structure, layout: Layout, labels: Sequence[str]) -> list[str]:
    names = _name_rows(structure, layout)
    margin = len(names[0])
    starts = _space_columns(layout, labels, WIDTH - margin)
    links = {(edge.source, edge.target) for edge in structure.edges}
    lines = []
    for row in sorted({row for row, _ in layout.cells}):
        line, last = " " * margin if row < 0 else names[row], -1
        for index in _find_row(layout, row):
            gap = margin + starts[layout.cells[index][1]] - len(line)
            line += _draw_gap(gap, (last, index) in links) + labels[index]
            last = index
        lines.append(line.rstrip())
    return lines


def _list_rows(structure: Structure, layout: Layout, labels: Sequence[str]) -> list[str]:
    """Blocks of each resolution in a list, where there are too many for a drawing."""
    lines: list[str] = []
    for row, name in enumerate(_name_rows(structure, layout)):
        lines += wrap(name + " ".join(labels[i] for i in _find_row(layout, row)), len(name))
    return lines


def _name_rows(structure: Structure, layout: Layout) -> list[str]:
    """Resolution and size of each row, all of one length."""
    sizes = {block.stride: block.size for block in reversed(structure.blocks)}
    names = [f"{name_stride(row)} {'x'.join(map(str, sizes[row]))}" for row in layout.rows]
    return [name.ljust(2 + max(map(len, names))) for name in names]


def _find_row(layout: Layout, row: int) -> list[int]:
    """Blocks of a row from left to right."""
    cells = [(column, index) for index, (r, column) in enumerate(layout.cells) if r == row]
    return [index for _, index in sorted(cells)]


def _label_blocks(structure: Structure) -> list[str]:
    labels = []
    for index, block in enumerate(structure.blocks):
        label = f"{SIGNS.get(block.join, block.join)}{block.channels}"
        if block.kind == "join":
            label = SIGNS.get(block.join, block.join)
        labels.append(f"({label})" if index == 0 else label)
    for index in structure.outputs:
        labels[index] = f"[{labels[index]}]"
    return labels


def _space_columns(layout: Layout, labels: Sequence[str], width: int) -> list[int]:
    """Where each column starts: behind the one before or, if that is too wide, closer to it."""
    for offset in (None, 2, 1):
        starts: list[int] = []
        ends: dict[int, int] = {}
        for column in range(1 + max(column for _, column in layout.cells)):
            here = [i for i, (_, c) in enumerate(layout.cells) if c == column]
            if offset is None:
                start = max(ends.values(), default=0)
            else:
                start = starts[-1] + offset if starts else 0
                start = max(start, *(ends.get(layout.cells[i][0], 0) for i in here))
            starts.append(start)
            ends |= {layout.cells[i][0]: start + len(labels[i]) + 1 for i in here}
        if max(ends.values()) - 1 <= width:
            break
    return starts


def _draw_gap(length: int, is_linked: bool) -> str:
    if not is_linked:
        return " " * length
    return "─" * length if length < 3 else "─" * (length - 1) + ">"


def _say_hidden(structure: Structure, layout: Layout) -> list[str]:
    """Connections that neither a line nor the next column shows, by the block that takes them."""
    hidden: dict[int, list[str]] = {}
    for edge in structure.edges:
        (row, first), (other, last) = layout.cells[edge.source], layout.cells[edge.target]
        is_tap = edge.stride != structure.blocks[edge.source].stride
        is_shown = layout.is_clear(row, first, last) if row == other else last - first == 1
        if is_tap or not (is_shown or other < 0):
            inner = f" (at {name_stride(edge.stride)})" if is_tap else ""
            source = _name_block(structure, edge.source) + inner
            hidden.setdefault(edge.target, []).append(source)
    lines = [
        f"{_name_block(structure, target)} also takes {', '.join(sources)}"
        for target, sources in hidden.items()
    ]
    return [part for line in lines for part in wrap(line, 2)]


def _name_block(structure: Structure, index: int) -> str:
    if name := structure.blocks[index].name:
        return name
    join = structure.blocks[index].join
    last = max(edge.source for edge in structure.edges if edge.target == index)
    return f"the {WORDS.get(join, join)} behind {structure.blocks[last].name}"
