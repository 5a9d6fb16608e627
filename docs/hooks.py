"""Fills the pages with what the code declares: the tables of settings."""

import itertools
import re

from simseg_jax.config import RunConfig
from simseg_jax.evaluators.probe import ProbeConfig
from simseg_jax.runtime.settings import declared

KINDS = {"run": RunConfig, "probe": ProbeConfig}


def on_page_markdown(markdown: str, **_) -> str:
    """Called by MkDocs for every page."""
    return re.sub(r"<!-- settings: (\w+) -->", lambda m: tables(KINDS[m[1]]), markdown)


def tables(kind: type) -> str:
    """One table for each group of settings."""

    def group_of(item: tuple) -> str:
        return item[0].replace("<name>", "NAME").rpartition(".")[0]

    lines = []
    for group, settings in itertools.groupby(sorted(declared(kind), key=group_of), group_of):
        lines += ["", f"## `{group}`" if group else "", "", "| key | default | values | meaning |"]
        lines.append("|---|---|---|---|")
        for name, field in settings:
            cells = [f"`{name.rpartition('.')[2]}`", f"`{field.default!r}`"]
            cells += [field.metadata["accepts"].text, field.metadata["meaning"]]
            lines.append(f"| {' | '.join(escaped(cell) for cell in cells)} |")
    return "\n".join(lines)


def escaped(text: str) -> str:
    """Text for a cell of a table."""
    return text.replace("|", "\\|").replace("<", "&lt;")
