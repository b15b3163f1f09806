"""Run calibration data through a prepared graph."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import fx

from graphq.calibration.batches import NO_DATA, batches_of, check_batch, images_together
from graphq.errors import CalibrationError, StateError
from graphq.graph.devices import device_of
from graphq.graph.on_disk import on_disk

T = TypeVar("T")
TOGETHER = 4  # samples; more cost memory and gain nothing


def run_calibration(
    gm: fx.GraphModule, data: Any, *, progress: bool = True, together: bool = True, only_check: bool = False
) -> int:
    """Run every batch through the graph; returns how many. Raises CalibrationError before any work if there is none
    or the first does not fit. together: small batches of images may run as one. only_check: nobody looks at what the
    graph computes, so batches are looked at and not run."""
    if callable(data) and not isinstance(data, Iterable):
        with torch.no_grad():
            data(gm)
        return 1
    batches = batches_of(data, device_of(gm))
    first = next(batches, None)
    if first is None:
        raise CalibrationError("there is no calibration data: the iterable is empty", remedy=NO_DATA)
    check_batch(gm, *first, number=0)
    if only_check:
        for number, batch in enumerate(batches, start=1):
            check_batch(gm, *batch, number=number)
        return 0
    if any(on_disk(t) for t in itertools.chain(gm.parameters(), gm.buffers())):
        raise StateError(
            "activations are observed while the whole model runs, and its weights are on disk",
            remedy="Quantize weights alone, or find the scales of inputs at run time (dynamic: true).",
        )
    total = len(data) if hasattr(data, "__len__") else None
    count = 0
    limit = TOGETHER if together else 1
    with _bar(show=progress) as bar, torch.no_grad():
        task = bar.add_task("calibrating", total=total)
        for many, (args, kwargs) in images_together(gm, itertools.chain([first], batches), limit):
            gm(*args, **kwargs)
            count += many
            bar.advance(task, many)
    return count


def progress_of(items: Iterable[T], label: str, *, show: bool) -> Iterator[T]:
    """The items, with a bar that says how many are done, how long the rest will take, and the memory in use."""
    items = list(items)
    with _bar(show=show) as bar:
        yield from bar.track(items, description=label)


def _bar(*, show: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), _Memory())
    return Progress(*columns, transient=True, disable=not show)


class _Memory(ProgressColumn):
    """Of the process, and of the accelerator where there is one."""

    def render(self, task: Task) -> Text:
        parts = [f"{n / 1e9:.1f} GB" for n in (resident(), device_memory()) if n]
        return Text(" + ".join(parts), style="progress.remaining")


def resident() -> int:
    """Bytes of memory that this process holds now; 0 where the system does not say (it does on Linux)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def device_memory() -> int:
    """Bytes that tensors hold on the current CUDA device; 0 without one."""
    return torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0
