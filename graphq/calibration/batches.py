"""Calibration data as batches that fit the graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from graphq.errors import CalibrationError
from graphq.graph.capture import example_of
from graphq.graph.devices import moved

NO_DATA = "Give an iterable of tensors, tuples or dicts (a DataLoader is one), or a callable that runs the model."

Batch = tuple[tuple[Any, ...], dict[str, Any]]  # (args, kwargs)


def batches_of(data: Any, device: torch.device | None = None) -> Iterator[Batch]:
    """(args, kwargs) for every batch: a tensor is one argument, a tuple or list several, a mapping goes by name.

    device: where their tensors are wanted.
    """
    if isinstance(data, (Tensor, Mapping)) or not isinstance(data, Iterable):
        raise CalibrationError(f"calibration data is a {type(data).__name__}, not batches of inputs", remedy=NO_DATA)
    for batch in data:
        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}
        if isinstance(batch, Mapping):
            kwargs = dict(batch)
        else:
            args = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
        yield (args, kwargs) if device is None else moved((args, kwargs), device)


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
        elif isinstance(tensor, (int, float, str, bool, type(None))) and given[name] is not tensor != given[name]:
            raise CalibrationError(
                f"input {name!r} is {_named(given[name])}, and was traced as the constant {tensor!r}",
                where=f"batch {number}",
                remedy="Capture the model again for another value, or make it a tensor.",
            )


def _named(value: Any) -> str:
    return "a tensor" if isinstance(value, Tensor) else repr(value)


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


def images_together(gm: fx.GraphModule, batches: Iterable[Batch], limit: int) -> Iterator[tuple[int, Batch]]:
    """(how many batches, one batch of them all): small batches of images run faster together, and channels last."""
    waiting: list[Batch] = []
    for number, batch in enumerate(batches):
        check_batch(gm, *batch, number)
        if not _free_batch_of_images(gm, batch):
            yield 1, batch
            continue
        samples = sum(_samples(b) for b in [*waiting, batch])
        if waiting and (_shapes(waiting[0]) != _shapes(batch) or samples > limit):
            yield len(waiting), _joined(waiting)
            waiting = []
        waiting.append(batch)
    if waiting:
        yield len(waiting), _joined(waiting)


def _free_batch_of_images(gm: fx.GraphModule, batch: Batch) -> bool:
    tensors = [*batch[0], *batch[1].values()]
    shapes = example_of(gm).dynamic_shapes.values()
    images = all(isinstance(t, Tensor) and t.ndim == 4 and t.is_floating_point() for t in tensors)
    return bool(tensors) and images and all(isinstance(s, dict) and 0 in s for s in shapes)


def _shapes(batch: Batch) -> list[Any]:
    """Names and shapes without the batch dimension: what batches must have in common to run as one."""
    return [list(batch[1]), *(t.shape[1:] for t in (*batch[0], *batch[1].values()))]


def _samples(batch: Batch) -> int:
    return next(len(t) for t in (*batch[0], *batch[1].values()))


def _joined(batches: list[Batch]) -> Batch:
    def join(*tensors: Tensor) -> Tensor:
        return torch.cat(tensors).contiguous(memory_format=torch.channels_last)

    args = tuple(join(*column) for column in zip(*(a for a, _ in batches), strict=True))
    return args, {k: join(*(kw[k] for _, kw in batches)) for k in batches[0][1]}
