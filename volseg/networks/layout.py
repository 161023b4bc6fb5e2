"""Where the blocks of a network stand in a drawing: rows are resolutions, columns the way through.

Kept apart from the pens: the terminal's and the one for pictures draw the same layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from volseg.networks.structure import Structure


@dataclass(frozen=True)
class Layout:
    """A cell for every block.

    Attributes:
        rows: total stride of each row, per axis, the finest first.
        cells: per block its row and column. Row -1 is above the finest, for outputs that leave
            in the middle of it.
    """

    rows: tuple[tuple[int, ...], ...]
    cells: tuple[tuple[int, int], ...]

    def is_clear(self, row: int, first: int, last: int) -> bool:
        """Whether no block stands between two columns of a row."""
        return not any(row == r and first < column < last for r, column in self.cells)


def arrange(structure: Structure) -> Layout:
    """Give every block a cell of its own.

    A block stands one column behind the last of those that it takes features from. Outputs stand
    at the end of their row.

    >>> from volseg.networks import UNet
    >>> from volseg.networks.structure import trace_structure
    >>> arrange(trace_structure(UNet(2, 1, 2, channels=(8, 16)), (32, 32))).cells
    ((0, 0), (0, 1), (1, 2), (0, 3), (0, 4))
    """
    strides = {block.stride for block in structure.blocks}
    rows = sorted(strides, key=lambda stride: (math.prod(stride), stride))
    row_of = [rows.index(block.stride) for block in structure.blocks]
    sources: list[list[int]] = [[] for _ in structure.blocks]
    for edge in structure.edges:
        sources[edge.target].append(edge.source)
    inner = [i for i in range(len(sources)) if any(i in several for several in sources)]
    cells: dict[int, tuple[int, int]] = {}
    for index in inner:
        column = 1 + max((cells[source][1] for source in sources[index]), default=-1)
        cells[index] = _find_free(cells, row_of[index], column)
    ends = {row: max((c for r, c in cells.values() if r == row), default=-1) for row in row_of}
    for index in set(range(len(sources))) - set(inner):
        row, (above, column) = row_of[index], max(cells[source] for source in sources[index])
        if row == above == 0 and column < ends[0]:
            cells[index] = (-1, column)
        else:
            cells[index] = _find_free(cells, row, 1 + max(column, ends[row]))
    return Layout(tuple(rows), tuple(cell for _, cell in sorted(cells.items())))


def name_stride(stride: Sequence[int]) -> str:
    """What a row is called: its size as a share of the image's.

    >>> name_stride((1, 1)), name_stride((4, 4)), name_stride((1, 2, 2))
    ('1', '1/4', '1/(1x2x2)')
    """
    if len(set(stride)) > 1:
        return f"1/({'x'.join(map(str, stride))})"
    return "1" if stride[0] == 1 else f"1/{stride[0]}"


def _find_free(cells: dict[int, tuple[int, int]], row: int, column: int) -> tuple[int, int]:
    """The first free cell of a row from `column` on."""
    while (row, column) in cells.values():
        column += 1
    return row, column
