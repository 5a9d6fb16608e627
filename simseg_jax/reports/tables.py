"""Results for combinations of settings beside the paper's numbers, as text, CSV and plot."""

import argparse
import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from simseg_jax.reports.statistics import write_csv
from simseg_jax.runtime.errors import UserError
from simseg_jax.runtime.settings import get, literal, plain


class Table(NamedTuple):
    """values: key -> its values, all of which are combined. paper: test set -> values of a
    combination -> the number in the paper.
    """

    title: str
    values: dict[str, tuple]
    paper: dict[str, dict[tuple, float]]


def paper_rows(keys: Sequence[tuple], **rows: Sequence[float]) -> dict[str, dict[tuple, float]]:
    """`Table.paper` from percentages: for each test set one number per element of `keys`."""
    return {
        data: {key: value / 100 for key, value in zip(keys, row, strict=True)}
        for data, row in rows.items()
    }


def paper_columns(table: Table, values: tuple) -> dict[str, float]:
    """The paper's numbers for a combination of values; NaN where it has none."""
    return {f"paper {data}": row.get(values, math.nan) for data, row in table.paper.items()}


def add_table_options(parser: argparse.ArgumentParser, tables: Iterable[str]) -> None:
    """Options for a table of the paper, or for the values of any keys."""
    parser.add_argument("--table", choices=tables, help="a table of the paper")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=A,B,...", help="values of a key"
    )


def check_table_options(args: argparse.Namespace, tables: Iterable[str]) -> None:
    """Raises a `UserError` unless exactly one of both options was given."""
    if bool(args.table) == bool(args.set):
        raise UserError(f"Give either --table ({', '.join(tables)}) or --set=KEY=A,B,...")


def parse_values(settings, arguments: Sequence[str]) -> dict[str, tuple]:
    """Key -> values, from --set arguments; values get the type of the key's setting."""
    values = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        current = get(plain(settings), key)
        if not equals or not text or isinstance(current, tuple):
            raise UserError(f"Cannot read --set={argument}: write --set=sigma_weight=0.5,1.")
        parts = [part.strip() for part in text.split(",")]
        values[key] = tuple(p if isinstance(current, str) else literal(key, p) for p in parts)
    return values


def format_rows(table: Table, rows: Sequence[dict]) -> str:
    """The rows as aligned columns under the title; results with four decimals, NaN as "-"."""
    lines = [[_cell(v, key in table.values) for key, v in row.items()] for row in rows]
    cells = [list(rows[0]), *lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    text = ["  ".join(f"{c:>{w}}" for c, w in zip(line, widths, strict=True)) for line in cells]
    return "\n".join([table.title, *text])


def _cell(value, setting: bool) -> str:
    if setting:
        return str(value)
    return "-" if math.isnan(value) else f"{value:.4f}"


def write_table(folder: Path, table: Table, rows: Sequence[dict]) -> None:
    """Writes table.csv, and table.png with a panel per result.

    The last key is the x axis; each combination of the other keys is a line.
    """
    # Imported late: it takes a second, and only plots need it.
    from matplotlib.figure import Figure

    write_csv(folder / "table.csv", rows)
    *outer, x = table.values
    columns = [column for column in rows[0] if column not in table.values]
    width = min(len(columns), 3)
    height = -(-len(columns) // width)
    figure = Figure(figsize=(5 * width, 3.6 * height), layout="constrained")
    figure.suptitle(table.title)
    # The paper's numbers have their own panels and scales: they are for other images and models.
    panels = figure.subplots(height, width, squeeze=False).reshape(-1)
    for axes in panels[len(columns) :]:
        axes.set_axis_off()
    for axes, column in zip(panels, columns, strict=False):
        for values, group in itertools.groupby(rows, key=lambda row: [row[key] for key in outer]):
            line = list(group)
            label = ", ".join(f"{k} {v}" for k, v in zip(outer, values, strict=True))
            # A line between words would mean nothing.
            draw = axes.bar if isinstance(line[0][x], str) else axes.plot
            draw([str(r[x]) for r in line], [r[column] for r in line], label=label)
        axes.set(
            title=column, xlabel=x, ylabel=column.rpartition("/")[2] if "/" in column else "mIoU"
        )
        axes.grid(alpha=0.3)
    if outer:
        figure.legend(handles=panels[0].lines, loc="outside right upper")
    figure.savefig(folder / "table.png", dpi=120)
