"""An earlier evaluation of the same images, which a new one is compared with."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from simseg_jax.evaluators.records import Record, stored
from simseg_jax.runtime.errors import UserError, some
from simseg_jax.runtime.settings import leaves


class Earlier(NamedTuple):
    """name: in tables. folder: the --output of `simseg_jax.evaluate`."""

    name: str
    folder: Path

    @classmethod
    def named(cls, argument: str) -> "Earlier":
        """From [NAME=]FOLDER; without NAME it is called as the run that the folder belongs to.

        The folder may have "=" in its path, as those of `simseg_jax.ablate` have.
        """
        parts = argument.split("=")
        readings = [("=".join(parts[:i]), "=".join(parts[i:])) for i in range(len(parts))]
        found = [(name, Path(path)) for name, path in readings if path and Path(path).is_dir()]
        if not found:
            path = argument.partition("=")[2] or argument
            raise UserError(f"--against={argument}: there is no folder {path}.")
        if len(found) > 1:
            folders = " or ".join(str(folder) for _, folder in found)
            raise UserError(
                f"--against={argument} may mean {folders}: give the path in another way."
            )
        name, folder = found[0]
        return cls(name or folder.resolve().parent.name, folder)

    def records(
        self, test_set: str, ours: Sequence[Record], settings: Mapping[str, Any]
    ) -> tuple[list[Record], str]:
        """(its records of the images of `ours` in their order, its settings that differ).

        settings: of the new evaluation. A `UserError` if images are missing or their masks differ.
        """
        folder = self.folder / test_set
        identity, records = stored(folder)
        known = {record.name: record for record in records}
        missing = [record.name for record in ours if record.name not in known]
        if missing:
            raise UserError(
                f"{folder} has no result for {len(missing)} of {len(ours)} images, of "
                f"{some(missing)}: evaluate the same images there."
            )
        theirs = [known[record.name] for record in ours]
        pairs = zip(ours, theirs, strict=True)
        changed = [a.name for a, b in pairs if not np.array_equal(a.truth, b.truth)]
        if changed:
            raise UserError(
                f"{folder} is about other masks or classes: {len(changed)} of {len(ours)} images "
                f"have different true pixels there, of {some(changed)}."
            )
        # Through JSON, as theirs: it has no tuples.
        new = dict(leaves(json.loads(json.dumps(settings))))
        old = dict(leaves(identity["settings"]["0"]))
        differing = [f"{key}={old.get(key)!r}" for key in new if old.get(key) != new[key]]
        return theirs, ", ".join(differing)
