"""Draw every network as an SVG file: ``python scripts/draw_networks.py docs/images/networks``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from volseg.networks import build_network, list_networks
from volseg.networks.layout import arrange, name_stride
from volseg.networks.structure import Block, Edge, Structure, trace_structure

OPTIONS: dict[str, dict[str, Any]] = {"unet": {"deep_supervision": True}}
"""As the planner trains it; every other network as its source has it."""
BOX, JOIN, GAP, MARGIN = 40, 18, 22, 46
"""Widths of boxes and joins, between columns, and on the left for the names of the rows."""
HEIGHT, PITCH, BADGE = 26, 62, 6
"""Of a box, from row to row, and the radius of the sign of a box that joins its inputs."""
SIGNS = {"add": "+", "cat": "c"}
LEGEND = "number: channels · c: concatenation · +: sum · orange: skip connections · green: logits"
STYLE = """
text{font:11px system-ui,sans-serif;fill:#24292f;text-anchor:middle}.left{text-anchor:start}
.card{fill:#fff}.box{fill:#ddf4ff;stroke:#0969da}.logits{fill:#dafbe1;stroke:#1a7f37}
.image,.join{fill:#fff;stroke:#57606a}.way,.skip{fill:none;stroke:#57606a}.skip{stroke:#bc4c00}
.way-tip{fill:#57606a}.skip-tip{fill:#bc4c00}
@media (prefers-color-scheme:dark){text{fill:#e6edf3}.card{fill:#0d1117}
.box{fill:#0c2d6b;stroke:#58a6ff}.logits{fill:#033a16;stroke:#3fb950}
.image,.join{fill:#0d1117;stroke:#8b949e}.way{stroke:#8b949e}.skip{stroke:#f0883e}
.way-tip{fill:#8b949e}.skip-tip{fill:#f0883e}}
"""


class Drawing:
    """One network; lengths in pixels, y downwards."""

    def __init__(self, name: str, structure: Structure) -> None:
        """Fix where every row and column lies."""
        self.name = name
        self.blocks, self.edges = structure.blocks, structure.edges
        self.outputs = structure.outputs
        self.layout = arrange(structure)
        x = MARGIN
        self.lefts: list[int] = []
        self.widths: list[int] = []
        for column in range(1 + max(column for _, column in self.layout.cells)):
            self.lefts.append(x)
            self.widths.append(max(_width(self.blocks[i]) for i in self.find_column(column)))
            x += self.widths[-1] + GAP
        self.width = max(x - GAP + 12, 500)
        has_lane = min(row for row, _ in self.layout.cells) < 0
        self.top = HEIGHT // 2 + 12 + (PITCH if has_lane else 0)

    def find_column(self, column: int) -> list[int]:
        """Blocks of a column."""
        return [index for index, (_, c) in enumerate(self.layout.cells) if c == column]

    def centre(self, index: int) -> tuple[int, int]:
        """Of a block."""
        row, column = self.layout.cells[index]
        return self.lefts[column] + self.widths[column] // 2, self.top + row * PITCH

    def svg(self) -> str:
        """The whole file."""
        height = self.top + (len(self.layout.rows) - 1) * PITCH + HEIGHT + 26
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{height}" '
            f'viewBox="0 0 {self.width} {height}" role="img">',
            f"<title>{self.name}</title><style>{STYLE}</style>",
            f"<defs>{_marker('way')}{_marker('skip')}</defs>",
            f'<rect class="card" width="{self.width}" height="{height}" rx="6"/>',
        ]
        for row, stride in enumerate(self.layout.rows):
            y = self.top + row * PITCH + 4
            lines.append(f'<text class="left" x="8" y="{y}">{name_stride(stride)}</text>')
        lines += map(self.draw_edge, self.edges)
        lines += (self.draw_block(index) for index in range(len(self.blocks)))
        lines.append(f'<text class="left" x="8" y="{height - 10}">{LEGEND}</text></svg>')
        return "\n".join(lines) + "\n"

    def draw_block(self, index: int) -> str:
        """A box with its channels, or the sign of a join."""
        block, (x, y) = self.blocks[index], self.centre(index)
        if block.kind == "join":
            return _circle(block, x, y, JOIN // 2, "logits" if index in self.outputs else "join")
        look = "image" if index == 0 else "logits" if index in self.outputs else "box"
        left, top = x - BOX // 2, y - HEIGHT // 2
        badge = _circle(block, left, y, BADGE) if block.join else ""
        return (
            f'<rect class="{look}" x="{left}" y="{top}" width="{BOX}" height="{HEIGHT}" rx="4">'
            f"<title>{block.name}: {block.kind}</title></rect>"
            f'<text x="{x}" y="{y + 4}">{block.channels}</text>{badge}'
        )

    def draw_edge(self, edge: Edge) -> str:
        """An arrow that keeps clear of the boxes between."""
        (_, first), (above, last) = (self.layout.cells[i] for i in (edge.source, edge.target))
        ends = edge.target in self.outputs and self.blocks[edge.target].kind != "join"
        is_tap = edge.stride != self.blocks[edge.source].stride
        look = "skip" if is_tap or (last - first > 1 and not ends) else "way"
        path = f"V{self.centre(edge.target)[1] + HEIGHT // 2}" if above < 0 else self.route(edge)
        x, y = self.centre(edge.source)
        start = f"M{x} {y}"
        return f'<path class="{look}" marker-end="url(#{look})" d="{start}{path}"/>'

    def route(self, edge: Edge) -> str:
        """From the centre of a block to the left side of another."""
        (row, first), (below, last) = (self.layout.cells[i] for i in (edge.source, edge.target))
        (x, y), (x_end, y_end) = self.centre(edge.source), self.centre(edge.target)
        entry = x_end - _width(self.blocks[edge.target]) // 2
        entry -= BADGE if self.blocks[edge.target].join and entry < x_end - JOIN // 2 else 0
        if edge.stride != self.blocks[edge.source].stride:
            return f"V{y_end}H{entry}"
        if row == below and not self.layout.is_clear(row, first, last):
            rise = y - HEIGHT // 2 - 8 - 3 * (last - first)
            if self.blocks[edge.target].kind == "join":
                return f"C{x} {rise} {x_end} {rise} {x_end} {y_end - JOIN // 2}"
            x_end -= 8  # An arrow from its middle may leave for an output above.
            return f"C{x} {rise} {x_end} {rise} {x_end} {y_end - HEIGHT // 2}"
        if row == below:
            return f"H{entry}"
        turn = last if self.layout.is_clear(row, first, last) else first + 1
        a, b = self.lefts[turn] - GAP, self.lefts[turn]
        return f"H{a}C{a + 16} {y} {b - 16} {y_end} {min(b, entry)} {y_end}H{entry}"


def _width(block: Block) -> int:
    return JOIN if block.kind == "join" else BOX


def _circle(block: Block, x: int, y: int, radius: int, look: str = "join") -> str:
    return (
        f'<circle class="{look}" cx="{x}" cy="{y}" r="{radius}"/>'
        f'<text x="{x}" y="{y + 3}">{SIGNS.get(block.join, block.join)}</text>'
    )


def _marker(look: str) -> str:
    return (
        f'<marker id="{look}" viewBox="0 0 6 6" refX="6" refY="3" markerWidth="6" '
        f'markerHeight="6" orient="auto"><path class="{look}-tip" d="M0 0L6 3L0 6z"/></marker>'
    )


def draw(name: str) -> str:
    """SVG of a network with two classes and its source's widths."""
    facts = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
    with torch.device("meta"):
        network = build_network(name, **facts, **OPTIONS.get(name, {}))
    size = [2 * stride for stride in network.total_stride]
    return Drawing(name, trace_structure(network, size)).svg()


def main() -> None:
    """Read the arguments and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="folder for NAME.svg")
    output: Path = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    for name in list_networks():
        path = output / f"{name}.svg"
        path.write_text(draw(name), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
