"""LayerView: one node of the graph, seen as a layer of the model."""

from __future__ import annotations

import importlib
import re
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from graphq.errors import PassError
from graphq.graph.on_disk import on_disk, values_of
from graphq.graph.optable import family_of

_CALL_NUMBER = re.compile(r"@\d+$")

MADE = "graphq_made"  # in a graph's meta: names of the tensors that passes have made of the model's own


@cache
def _ancestry(qualified: str) -> tuple[str, ...]:
    """The names of a class and its bases, down to nn.Module; only its own name where it cannot be imported."""
    module, _, name = qualified.rpartition(".")
    if module not in sys.modules:
        try:
            importlib.import_module(module)
        except (ImportError, ValueError):
            return (qualified,)
    cls = getattr(sys.modules.get(module), name, None)
    if not isinstance(cls, type):
        return (qualified,)
    return tuple(f"{c.__module__}.{c.__qualname__}" for c in cls.__mro__ if c not in (object, torch.nn.Module))


def read_all(gm: fx.GraphModule) -> None:
    """Read, in place, the tensors on disk that a graph of its own nodes reads."""
    for node in gm.graph.find_nodes(op="get_attr"):
        tensor = held(gm, node)
        if tensor is not None and on_disk(tensor):
            owner, _, leaf = str(node.target).rpartition(".")
            place, values = gm.get_submodule(owner), values_of(tensor)
            if isinstance(tensor, nn.Parameter):
                place.register_parameter(leaf, nn.Parameter(values, requires_grad=False))
            else:
                place.register_buffer(leaf, values)


def module_stack(node: fx.Node) -> list[tuple[str, str]]:
    """(module path, qualified class name) of every module around the node, outermost first; the root is ''."""
    stack = []
    for path, cls in (node.meta.get("nn_module_stack") or {}).values():
        name = cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}"
        if path.startswith("_empty_nn_module_stack"):  # what torch writes on ops that tracing itself added
            continue
        stack.append((_CALL_NUMBER.sub("", path), name))
    return stack


@cache
def schema_of(target: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """(names of an op's arguments in order, those with defaults by name)."""
    if not isinstance(target, OpOverload):  # operator.getitem
        return ("input", "index"), {}
    schema = target._schema.arguments
    return tuple(a.name for a in schema), {a.name: a.default_value for a in schema if a.has_default_value()}


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an ATen call by the names of its schema, defaults filled in."""
    names, defaults = schema_of(node.target)
    return defaults | dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def value_of(node: fx.Node) -> Any:
    """The example value (a FakeTensor, as a rule) that tracing left on the node, or None."""
    return node.meta.get("val")


def is_float(node: fx.Node) -> bool:
    """Does the node produce one floating-point tensor?"""
    value = value_of(node)
    return isinstance(value, Tensor) and value.is_floating_point()


def parameter(gm: fx.GraphModule, node: fx.Node | None) -> Tensor | None:
    """The tensor behind a get_attr node, read from disk where it is there; None for any other node."""
    tensor = held(gm, node)
    return None if tensor is None else values_of(tensor)


def held(gm: fx.GraphModule, node: fx.Node | None) -> Tensor | None:
    """The same as the graph holds it: a placeholder for a tensor on disk."""
    if node is None or node.op != "get_attr":
        return None
    value: Any = gm
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value if isinstance(value, Tensor) else None


PART_OF = "graphq_part_of"  # in a node's meta: the family of the op that it was taken out of


class LayerView:
    """A node with the vocabulary of a layer: path, class, op, inputs, weight, bias."""

    def __init__(self, gm: fx.GraphModule, node: fx.Node) -> None:
        self.gm, self.node = gm, node

    def __repr__(self) -> str:
        return f"{self.path or '(model)'} {self.op}"

    @property
    def name(self) -> str:
        """The node's own name, unique in the graph."""
        return self.node.name

    @property
    def path(self) -> str:
        """Path of the module that the op belongs to; '' for ops of the model's own forward."""
        stack = module_stack(self.node)
        return stack[-1][0] if stack else ""

    @property
    def type(self) -> str:
        """Qualified class name of that module."""
        stack = module_stack(self.node)
        return stack[-1][1] if stack else ""

    @property
    def types(self) -> tuple[str, ...]:
        """Classes, with their bases, of every module around the op except the model itself."""
        return tuple(t for _, cls in module_stack(self.node)[1:] for t in _ancestry(cls))

    @property
    def op(self) -> str:
        """The ATen op with its overload: "aten.conv2d.default"."""
        return str(self.node.target)

    @property
    def family(self) -> str:
        """The op's family in the op table, "conv"; that of the whole where it is a part that was taken out of one."""
        return str(self.node.meta.get(PART_OF) or family_of(self.node.target))

    @property
    def users(self) -> int:
        """How many nodes use the result."""
        return len(self.node.users)

    @property
    def shape(self) -> tuple[Any, ...]:
        """Shape of the result; dynamic dimensions are SymInts."""
        value = value_of(self.node)
        return tuple(value.shape) if isinstance(value, Tensor) else ()

    @property
    def dtype(self) -> torch.dtype | None:
        value = value_of(self.node)
        return value.dtype if isinstance(value, Tensor) else None

    @property
    def tensor(self) -> Tensor | None:
        """The parameter or buffer behind a get_attr node."""
        return parameter(self.gm, self.node)

    def arg(self, name: str) -> Any:
        """An argument by the name of the op's schema."""
        return arguments(self.node).get(name)

    def where(self) -> str:
        """For messages: module path, op and node."""
        return f"{self.path or '(model)'}, {self.op} ({self.name})"


def layers(gm: fx.GraphModule) -> list[LayerView]:
    """A view of every ATen op of the graph, in order."""
    return [LayerView(gm, n) for n in gm.graph.nodes if n.op == "call_function"]


def set_parameter(gm: fx.GraphModule, name: str, tensor: Tensor) -> str:
    """Register a tensor as a buffer at `name` (made unique); returns the name under which it lives."""
    owner_path, _, leaf = name.rpartition(".")
    try:
        owner = gm.get_submodule(owner_path)
    except AttributeError as e:
        raise PassError(f"cannot register {name!r}: no module {owner_path!r} in the graph") from e
    unique, number = leaf, 0
    while hasattr(owner, unique):
        number += 1
        unique = f"{leaf}_{number}"
    owner.register_buffer(unique, tensor if on_disk(tensor) else tensor.detach())
    made = f"{owner_path}.{unique}" if owner_path else unique
    gm.meta.setdefault(MADE, set()).add(made)
    return made


def drop_unused_parameters(gm: fx.GraphModule) -> None:
    """Forget parameters and buffers that no get_attr node reads, and modules that no call_module node calls."""
    used = {str(n.target) for n in gm.graph.nodes if n.op in ("get_attr", "call_module")}
    called = tuple(str(n.target) + "." for n in gm.graph.nodes if n.op == "call_module")
    tensors = [k for k, _ in gm.named_parameters(remove_duplicate=False)]
    tensors += [k for k, _ in gm.named_buffers(remove_duplicate=False)]
    for name in tensors:
        if name not in used and not name.startswith(called):
            owner, _, leaf = name.rpartition(".")
            delattr(gm.get_submodule(owner), leaf)
