"""Any model → an ATen graph in which every node knows its module path and type."""

from __future__ import annotations

import inspect
import io
import logging
import re
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from graphq.errors import CaptureError
from graphq.graph.functionalize import functionalize, mutates


@dataclass
class Example:
    """The example inputs of a graph and which of their dimensions are dynamic, as `torch.export` wants them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic_shapes: dict[str, Any]


def capture(
    model: nn.Module | fx.GraphModule | ExportedProgram,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = "batch",
    *,
    inplace: bool = False,
) -> fx.GraphModule:
    """Trace a model into an ATen graph.

    model: an nn.Module, a GraphModule of `torch.fx.symbolic_trace`, or an ExportedProgram (which brings its own
    example inputs and dynamic shapes). args, kwargs: example inputs.
    dynamic_shapes: "batch" (the first dimension of every input), "batch+sequence" (also the second), None
    (static), or whatever `torch.export.export` takes.
    The model is not changed; its parameters are shared, not copied, and no pass writes to them.
    inplace: allow tracing to leave its marks on the model (its train/eval mode is then not restored).

    Raises CaptureError that names the line of the model at which tracing stopped.
    """
    if isinstance(model, fx.GraphModule) and "graphq_example" in model.meta:
        return model
    if isinstance(model, ExportedProgram):
        program = model
    else:
        args, kwargs = _checked_inputs(args, dict(kwargs or {}))
        args, kwargs, shapes = _resolve_dynamic(model, args, kwargs, dynamic_shapes)
        with inference_mode(model, restore=not inplace):
            program = _export(model, args, kwargs, shapes)
    gm = program.module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    if any(mutates(n) for n in gm.graph.nodes) and not functionalize(gm):
        gm = program.run_decompositions({}).module(check_guards=False)
        assert isinstance(gm, fx.GraphModule)
    gm.meta["graphq_example"] = _example_of(program, gm)
    return gm


def example_of(gm: fx.GraphModule) -> Example:
    """The example that `capture` keeps with a graph."""
    example: Example = gm.meta["graphq_example"]
    return example


def _checked_inputs(args: Any, kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(args, Tensor):
        args = (args,)
    if isinstance(args, dict):
        args, kwargs = (), {**args, **kwargs}
    if not args and not kwargs:
        raise CaptureError(
            "tracing needs an example input",
            remedy="Pass args=(tensor, …) or kwargs={'name': tensor} of the shapes the model will see.",
        )
    for name, value in (*enumerate(args), *kwargs.items()):
        if type(value).__module__ == "numpy":
            raise CaptureError(
                "an input is a numpy array, not a tensor", where=f"input {name}", remedy="torch.from_numpy(array)."
            )
    # torch.export marks the tensors it is given as dynamic: let it mark tensors of ours
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.detach(), (tuple(args), kwargs))
    return args, kwargs


def _resolve_dynamic(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], wanted: Any
) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Turn "batch" and "batch+sequence" into torch's form. An example of size one is repeated to size two along a
    dynamic dimension, since torch.export would take a one for a constant."""
    if not isinstance(wanted, str):
        return args, kwargs, wanted
    if wanted not in ("batch", "batch+sequence"):
        raise CaptureError(
            f"unknown dynamic_shapes {wanted!r}",
            remedy="Use 'batch', 'batch+sequence', None (static), or the form of torch.export.export.",
        )
    dims = (0, 1) if wanted == "batch+sequence" else (0,)

    def widen(t: Any) -> Any:
        if isinstance(t, Tensor):
            for d in dims:
                if t.ndim > d and t.shape[d] == 1:
                    t = torch.cat([t, t], dim=d)
        return t

    def spec(t: Any) -> Any:
        return {d: Dim.DYNAMIC for d in dims if t.ndim > d} if isinstance(t, Tensor) else None

    args, kwargs = pytree.tree_map(widen, args), pytree.tree_map(widen, kwargs)
    try:
        bound = torch.export.dynamic_shapes._combine_args(model, args, kwargs)
    except TypeError as e:
        raise CaptureError(
            f"the example inputs do not fit the model: {e}",
            where=f"{type(model).__name__}.forward{inspect.signature(model.forward)}",
            remedy="A tuple or list is taken as several inputs, a dict by name; leave labels out of the batches.",
        ) from e
    return args, kwargs, pytree.tree_map(spec, dict(bound))


@contextmanager
def inference_mode(model: nn.Module, *, restore: bool = True) -> Iterator[None]:
    """Eval mode without gradients; every module's own training flag is put back afterwards."""
    before = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if restore:
            for module, training in before.items():
                module.training = training


@contextmanager
def _quiet() -> Iterator[None]:
    """torch dumps the half-traced graph on stderr when tracing fails; the error says what is needed of it."""
    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> ExportedProgram:
    try:
        with _quiet():
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as e:  # torch.export raises whatever the model's code raises: translate all of it
        what, remedy = _translate(e, shapes)
        raise CaptureError(what, where=_line_of_model(e), remedy=remedy) from e


def _translate(error: Exception, shapes: Any) -> tuple[str, str]:
    """(what went wrong, what to do) for the ways in which tracing fails."""
    text = str(error)
    name = type(error).__name__
    if "GuardOnDataDependent" in name or "data-dependent" in text or "Could not guard" in text:
        return (
            "the model's control flow depends on the values of a tensor",
            "Use torch.where or torch.cond there, or quantize the submodules before and after it.",
        )
    if "specialized" in text or "Constraints violated" in text or "ConstraintViolation" in name:
        return (
            f"a dimension that should stay dynamic is fixed by the model: {_first_line(text)}",
            "Pass dynamic_shapes=None, or only the dimensions that the model leaves free.",
        )
    if "proxy" in text.lower() and "bool" in text.lower():
        return ("the model branches on a traced value", "Use torch.where or torch.cond at that line.")
    return (f"tracing failed: {name}: {_first_line(text)}", "Run the model on these inputs; mend the line named above.")


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "(no message)")[:200]


def _line_of_model(error: Exception) -> str | None:
    """The innermost frame that belongs to neither torch nor graphq."""
    own = re.compile(r"[\\/](torch|graphq)[\\/]")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not own.search(f.filename)]
    frames = [f for f in frames if not f.filename.startswith("<")]
    if not frames:
        return None
    return f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}: {frames[-1].line}"


def _example_of(program: ExportedProgram, gm: fx.GraphModule) -> Example:
    if program.example_inputs is None:
        raise CaptureError(
            "the ExportedProgram carries no example inputs", remedy="Export it with torch.export.export."
        )
    args, kwargs = program.example_inputs
    user = {s.arg.name for s in program.graph_signature.input_specs if s.kind.name == "USER_INPUT"}  # type: ignore[union-attr]
    values = [n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder" and n.name in user]
    flat = [_dynamic_dims(v) for v in values]
    arg_specs, kwarg_specs = pytree.tree_unflatten(flat, program.call_spec.in_spec)
    names = list(gm.graph._codegen.pytree_info.orig_args)  # type: ignore[attr-defined]
    return Example(tuple(args), dict(kwargs), dict(zip(names, arg_specs, strict=False)) | dict(kwarg_specs))


def _dynamic_dims(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return None
    return {d: Dim.DYNAMIC for d, size in enumerate(value.shape) if isinstance(size, torch.SymInt)} or None


def flat_inputs(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Inputs in the order of the graph's placeholders."""
    names = list(example_of(gm).dynamic_shapes)
    given = dict(zip(names, args, strict=False)) | kwargs
    return pytree.tree_leaves([given[n] for n in names if n in given])
