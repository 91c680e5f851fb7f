"""Tables for people: coloured by rich on a terminal, plain text otherwise."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import click


def print_json(value: object) -> None:
    """JSON for programs."""
    click.echo(json.dumps(value, indent=2))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table with a title; an empty one says so."""
    if not rows:
        click.echo(f"{title}: none")
        return
    if sys.stdout.isatty():
        _print_rich(title, columns, rows)
        return
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    click.echo(f"{title}:")
    for row in [columns, *rows]:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        click.echo(("  " + "  ".join(cells)).rstrip())


def _print_rich(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        # Text, not str: rich would take [brackets] in a cell for its markup.
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)
