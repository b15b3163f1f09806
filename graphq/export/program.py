"""Write a lowered graph as an ExportedProgram (.pt2), for torch.export.load and torch.compile."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import fx

from graphq.errors import ExportError
from graphq.export.onnx import quiet, writable
from graphq.graph.capture import example_of
from graphq.graph.devices import on_cpu
from graphq.graph.generated import generate


def export_program(lowered: fx.GraphModule, path: str | Path) -> Path:
    """All of it or nothing, for a CPU. Raises ExportError if the path cannot be written."""
    path, lowered = writable(Path(path), ".pt2"), on_cpu(lowered)
    example = example_of(lowered)
    with quiet(), torch.no_grad():
        generate(lowered)
        program = torch.export.export(lowered, example.args, example.kwargs, dynamic_shapes=example.dynamic_shapes)
        try:
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
                part = Path(folder) / path.name
                torch.export.save(program, part)
                os.replace(part, path)
        except OSError as e:
            raise ExportError(
                f"the program could not be written: {e.strerror or e}", where=str(path), remedy="Free space."
            ) from e
    return path
