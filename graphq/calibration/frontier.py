"""What is alive of every sample between two ops: in memory, or in one file each."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from graphq.errors import CalibrationError

Values = dict[fx.Node, Any]


class Frontier:
    """The values of each sample, by the node that made them. folder: where they are kept instead of in memory; what was
    there before is deleted. Raises CalibrationError where they cannot be written."""

    def __init__(self, folder: Path | None, device: torch.device) -> None:
        self.folder, self.device, self.kept = folder, device, list[Values]()
        self.nodes: list[list[fx.Node]] = []
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
            try:
                folder.mkdir(parents=True)
            except OSError as e:
                raise CalibrationError(
                    f"the frontier cannot lie here: {e.strerror or e}", where=str(folder), remedy="Name another store."
                ) from e

    def __len__(self) -> int:
        return len(self.nodes)

    def append(self, values: Values) -> None:
        self.nodes.append([])
        self.kept.append({})
        self[len(self) - 1] = values

    def __getitem__(self, number: int) -> Values:
        """Of a sample: what lies in a file is read when it is used."""
        if self.folder is None:
            return self.kept[number]
        values = torch.load(self._path(number), mmap=True, weights_only=True, map_location=self.device)
        return dict(zip(self.nodes[number], values, strict=True))

    def __setitem__(self, number: int, values: Values) -> None:
        if self.folder is None:
            self.kept[number] = values
            return
        self.nodes[number] = list(values)
        part = self._path(number).with_suffix(".part")
        try:
            torch.save([_alone(v) for v in values.values()], part)
        except (OSError, RuntimeError) as e:
            raise CalibrationError(
                f"the frontier could not be written: {e}", where=str(part), remedy="Free space, or use fewer samples."
            ) from e
        part.replace(self._path(number))  # the file before it may still be mapped

    def _path(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{number}.pt"


def _alone(value: Any) -> Any:
    """A part of a larger tensor, without the rest."""
    if isinstance(value, Tensor) and value.untyped_storage().nbytes() > value.nbytes:
        return value.clone()
    return value
