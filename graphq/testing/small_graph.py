"""A graph of a few ops, built by hand or by the generator, that can be printed as the code that builds it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from graphq.graph.capture import Example
from graphq.graph.infer import infer


class SmallGraph:
    """Ops on seeded tensors. Every value is computed as it is added, so that an illegal op fails at once.

    dtype: of all float tensors. dynamic: the first dimension of the inputs that share it is symbolic.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, *, dynamic: bool = False) -> None:
        self.dtype, self.dynamic = dtype, dynamic
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.lines = [f"g = SmallGraph({dtype}{', dynamic=True' if dynamic else ''})"]
        self.real: dict[fx.Node, Any] = {}  # what each node gives
        self.returned: list[fx.Node] = []
        self.fixed = False  # the ops fix the size of the dynamic dimension, or bound it
        self._made: dict[fx.Node, dict[str, Any]] = {}  # how the tensors of inputs were made

    def input(self, *shape: int, strided: bool = False, wide: bool = False) -> fx.Node:
        """A tensor that the graph is called with. strided: its dimensions lie in memory in reverse order. wide: values
        up to about ±100, every third a whole number, zero among them; otherwise normal."""
        first_op = next((n for n in self.graph.nodes if n.op != "placeholder"), None)
        with self.graph.inserting_before(first_op) if first_op is not None else nullcontext():
            node = self.graph.placeholder(f"x{len(self._made)}")
        self._made[node] = {"shape": shape, "strided": strided, "wide": wide, "seed": len(self._made)}
        return self._add(node, self._noise(**self._made[node]), "input", shape, strided=strided, wide=wide)

    def param(self, *shape: int, positive: bool = False) -> fx.Node:
        """A parameter of the model. positive: between ½ and 1½, as a variance."""
        name = f"p{sum(1 for _ in self.root.buffers())}"
        self.root.register_buffer(name, self._noise(shape, 100 + len(self.real), positive=positive))
        return self._add(self.graph.get_attr(name), getattr(self.root, name), "param", shape, positive=positive)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """One op. Raises what torch raises if it does not take these arguments."""
        real = fx.node.map_arg((args, kwargs), lambda n: self.real[n])
        value = target(*real[0], **real[1])
        node = self.graph.call_function(target, args, kwargs)
        words = [_text(a) for a in args] + [f"{k}={_text(v)}" for k, v in kwargs.items()]
        name = f"torch.ops.{target}" if "::" not in str(target) and str(target).startswith("aten") else _op_text(target)
        self.lines.append(f"{node.name} = g.call({', '.join([name, *words])})")
        self.real[node] = value
        return node

    def output(self, *nodes: fx.Node) -> None:
        """What the graph returns."""
        self.returned += nodes
        self.lines.append(f"g.output({', '.join(n.name for n in nodes)})")

    def module(self) -> fx.GraphModule:
        """The graph as capture would have made it; a new copy each time."""
        graph = fx.Graph()
        twin: dict[fx.Node, fx.Node] = {}
        graph.graph_copy(self.graph, twin)
        graph.output(tuple(twin[n] for n in self.returned))
        values = self._symbolic(graph, {new: old for old, new in twin.items()})
        root = nn.Module()
        for name, buffer in self.root.named_buffers():
            root.register_buffer(name, buffer.clone())
        gm = fx.GraphModule(root, graph)
        for node in graph.nodes:
            node.meta["val"] = values.get(node)
        free = {0: Dim.DYNAMIC} if self.dynamic else None
        shapes = {n.name: free if self._is_batched(n) else None for n in self._made}
        gm.meta["graphq_example"] = Example(tuple(self.feed()), {}, shapes)
        return gm

    def feed(self, *, more: int = 0) -> list[Tensor]:
        """The inputs; `more` rows are added to the dynamic dimension."""
        return [
            self._noise(**{**m, "shape": (m["shape"][0] + more, *m["shape"][1:])})
            if more and self._is_batched(n)
            else self.real[n]
            for n, m in self._made.items()
        ]

    def code(self) -> str:
        """The lines that build this graph again."""
        return "\n".join(
            ["import operator", "", "import torch", "from graphq.testing import SmallGraph, check", "", *self.lines]
        )

    @property
    def ops(self) -> int:
        """How many ops it has."""
        return sum(n.op == "call_function" for n in self.graph.nodes)

    def _is_batched(self, node: fx.Node) -> bool:
        first = next(iter(self._made.values()))["shape"]
        shape = self._made[node]["shape"]
        return self.dynamic and bool(shape) and bool(first) and shape[0] == first[0] > 1

    def _add(self, node: fx.Node, value: Tensor, kind: str, shape: tuple[int, ...], **options: bool) -> fx.Node:
        self.real[node] = value
        words = [*map(str, shape), *(f"{k}=True" for k, v in options.items() if v)]
        self.lines.append(f"{node.name} = g.{kind}({', '.join(words)})")
        return node

    def _noise(
        self, shape: tuple[int, ...], seed: int, *, positive: bool = False, strided: bool = False, wide: bool = False
    ) -> Tensor:
        random = torch.Generator().manual_seed(seed)
        stored = shape[::-1] if strided else shape
        value = torch.rand(stored, generator=random) + 0.5 if positive else torch.randn(stored, generator=random)
        if wide:
            value = value * 30
            value.flatten()[::3] = (value / 30).flatten()[::3].round()
        value = value.to(self.dtype)
        return value.permute(*range(value.ndim)[::-1]) if strided else value

    def _symbolic(self, graph: fx.Graph, original: dict[fx.Node, fx.Node]) -> dict[fx.Node, Any]:
        """Example values for the nodes of a copy, without data, and with a symbolic first dimension where asked."""
        values = {new: self.real[old] for new, old in original.items()}
        env = ShapeEnv()
        mode = FakeTensorMode(shape_env=env)
        for node in graph.nodes:
            if node.op == "placeholder":
                batched = self._is_batched(original[node])
                rank = values[node].ndim
                dims = [DimDynamic.DYNAMIC if d == 0 and batched else DimDynamic.STATIC for d in range(rank)]
                context: Any = StatelessSymbolicContext(dynamic_sizes=dims)
                values[node] = mode.from_tensor(values[node], symbolic_context=context)
            node.meta["val"] = values.get(node)
            if node.op == "call_function":
                values[node] = node.meta["val"] = infer(node)
        self.fixed = bool(env.guards)
        return values


def _text(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return f"float('{value}')"
    return repr(value)


def _op_text(target: Any) -> str:
    if hasattr(target, "_schema"):
        return f"torch.ops.{target._schema.name.replace('::', '.')}.{target._overloadname}"
    return f"{target.__module__.lstrip('_')}.{target.__name__}"  # operator.getitem
