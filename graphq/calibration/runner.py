"""Run calibration data through a prepared graph."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, fx, nn

from graphq.errors import CalibrationError
from graphq.graph.capture import example_of

TOGETHER = 4  # samples; more cost memory and gain nothing
Data = Iterable[Any] | Callable[[nn.Module], Any] | Tensor

NO_DATA = "Give an iterable of tensors, tuples or dicts (a DataLoader is one), or a callable that runs the model."


Batch = tuple[tuple[Any, ...], dict[str, Any]]  # (args, kwargs)


def batches_of(data: Any) -> Iterator[Batch]:
    """(args, kwargs) for every batch: a tensor is one argument, a tuple or list several, a mapping goes by name."""
    if isinstance(data, (Tensor, Mapping)) or not isinstance(data, Iterable):
        raise CalibrationError(f"calibration data is a {type(data).__name__}, not batches of inputs", remedy=NO_DATA)
    for batch in data:
        if isinstance(batch, Mapping):
            yield (), dict(batch)
        elif isinstance(batch, (tuple, list)):
            yield tuple(batch), {}
        else:
            yield (batch,), {}


def check_batch(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any], number: int) -> None:
    """Raises CalibrationError if a batch does not fit the inputs with which the graph was captured."""
    example = example_of(gm)
    names = list(example.dynamic_shapes)
    wanted = dict(zip(names, example.args, strict=False)) | example.kwargs
    if len(args) > len(names):
        raise CalibrationError(
            f"a batch has {len(args)} inputs, the model takes {len(names)} ({', '.join(names)})",
            where=f"batch {number}",
            remedy="A list is taken as several inputs; leave labels out of the batches.",
        )
    given = dict(zip(names, args, strict=False)) | kwargs
    missing, extra = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
    if missing or extra:
        what = f"lacks {', '.join(missing)}" if missing else f"brings {', '.join(extra)}, which the graph does not take"
        raise CalibrationError(
            f"a batch {what}", where=f"batch {number}", remedy=f"The graph was captured with {', '.join(wanted)}."
        )
    for name, tensor in wanted.items():
        if isinstance(tensor, Tensor):
            _check_tensor(name, given[name], tensor, example.dynamic_shapes.get(name) or {}, number)


def _check_tensor(name: str, given: Any, wanted: Tensor, dynamic: Any, number: int) -> None:
    if not isinstance(given, Tensor):
        raise CalibrationError(f"input {name!r} is a {type(given).__name__}, not a tensor", where=f"batch {number}")
    free = dynamic if isinstance(dynamic, dict) else {}
    same = given.ndim == wanted.ndim and all(
        d in free or a == b for d, (a, b) in enumerate(zip(given.shape, wanted.shape, strict=True))
    )
    if not same:
        shape = ["*" if d in free else str(s) for d, s in enumerate(wanted.shape)]
        raise CalibrationError(
            f"input {name!r} has shape {list(given.shape)}, the graph takes [{', '.join(shape)}]",
            where=f"batch {number}",
            remedy="Give batches of that shape, or capture with dynamic_shapes that leave the dimension free.",
        )
    if given.dtype != wanted.dtype:
        raise CalibrationError(
            f"input {name!r} is {given.dtype}, the graph takes {wanted.dtype}",
            where=f"batch {number}",
            remedy=f"Convert it: x.to({wanted.dtype}).",
        )


def run_calibration(gm: fx.GraphModule, data: Any, *, progress: bool = True, together: bool = True) -> int:
    """Run every batch through the graph; returns how many. Raises CalibrationError before any work if there is none
    or the first does not fit. together: small batches of images may run as one."""
    if callable(data) and not isinstance(data, Iterable):
        with torch.no_grad():
            data(gm)
        return 1
    batches = batches_of(data)
    first = next(batches, None)
    if first is None:
        raise CalibrationError("there is no calibration data: the iterable is empty", remedy=NO_DATA)
    check_batch(gm, *first, number=0)
    total = len(data) if hasattr(data, "__len__") else None
    device = next((p.device for p in itertools.chain(gm.parameters(), gm.buffers())), torch.device("cpu"))
    count = 0
    limit = TOGETHER if together else 1
    columns = (TextColumn("calibrating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True, disable=not progress) as bar, torch.no_grad():
        task = bar.add_task("calibrating", total=total)
        for many, (args, kwargs) in _images_together(gm, itertools.chain([first], batches), limit):
            gm(*_to(args, device), **_to(kwargs, device))
            count += many
            bar.advance(task, many)
    return count


def _images_together(gm: fx.GraphModule, batches: Iterable[Batch], limit: int) -> Iterator[tuple[int, Batch]]:
    """(how many batches, one batch of them all): small batches of images run faster together, and channels last."""
    waiting: list[Batch] = []
    for number, batch in enumerate(batches):
        check_batch(gm, *batch, number)
        if waiting and (_shapes(waiting[0]) != _shapes(batch) or _samples(batch) * (len(waiting) + 1) > limit):
            yield len(waiting), _joined(waiting)
            waiting = []
        waiting.append(batch)
        if not _free_batch_of_images(gm, batch):
            yield 1, waiting.pop()
    if waiting:
        yield len(waiting), _joined(waiting)


def _free_batch_of_images(gm: fx.GraphModule, batch: Batch) -> bool:
    tensors = [*batch[0], *batch[1].values()]
    shapes = [example_of(gm).dynamic_shapes.get(name) or {} for name in example_of(gm).dynamic_shapes]
    images = all(isinstance(t, Tensor) and t.ndim == 4 and t.is_floating_point() for t in tensors)
    return images and all(isinstance(s, dict) and 0 in s for s in shapes)


def _shapes(batch: Batch) -> list[Any]:
    return [list(batch[1]), *(getattr(t, "shape", None) for t in (*batch[0], *batch[1].values()))]


def _samples(batch: Batch) -> int:
    return next(len(t) for t in (*batch[0], *batch[1].values()))


def _joined(batches: list[Batch]) -> Batch:
    def join(*tensors: Tensor) -> Tensor:
        return torch.cat(tensors).contiguous(memory_format=torch.channels_last)

    args = tuple(join(*column) for column in zip(*(a for a, _ in batches), strict=True))
    return args, {k: join(*(kw[k] for _, kw in batches)) for k in batches[0][1]}


def _to(value: Any, device: torch.device) -> Any:
    return torch.utils._pytree.tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, value)
