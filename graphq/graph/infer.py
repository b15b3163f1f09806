"""The example value of a new op, computed from those of its inputs without any data."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._subclasses import FakeTensor, FakeTensorMode

from graphq.errors import PassError

MISFITS = (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError, AssertionError)


def infer(node: fx.Node) -> Any:
    """What a call_function node gives: FakeTensors, or numbers. Raises PassError if it does not fit its inputs."""
    known = [n.meta.get("val") for n in node.all_input_nodes]
    mode = detect_fake_mode(known) or _mode_of(node.graph)

    def value(n: fx.Node) -> Any:
        met = n.meta.get("val")
        if isinstance(met, Tensor) and not isinstance(met, FakeTensor):
            return mode.from_tensor(met, static_shapes=True)
        return met

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
    try:
        with mode, enable_python_dispatcher():  # some ops know symbolic sizes only by their Python decompositions
            return node.target(*args, **kwargs)  # type: ignore[operator]
    except MISFITS as e:
        shapes = ", ".join(_shape(v) for v in known)
        raise PassError(
            f"{node.target} does not take these arguments: {str(e).splitlines()[0] if str(e) else type(e).__name__}",
            where=f"{node.format_node()}  (inputs: {shapes})",
            remedy="Check order, shapes and dtypes of what `rewrite` builds; a custom op needs register_fake.",
        ) from e


def _mode_of(graph: fx.Graph) -> FakeTensorMode:
    """The one in which the graph was traced: an op on parameters alone does not show it."""
    inputs = [n.meta.get("val") for n in graph.find_nodes(op="placeholder")]
    return detect_fake_mode(inputs) or FakeTensorMode()


def _shape(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}".removeprefix("torch.") if isinstance(value, Tensor) else repr(value)
