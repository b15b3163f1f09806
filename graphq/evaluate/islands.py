"""Float islands: what the runtime computes in float between its integer kernels, run by the runtime itself.

A simulation of the integer kernels alone, with all that is float left to the runtime, differs from the runtime only
where a kernel is simulated wrongly. With the float ops in torch it differs everywhere: their last bits do, codes at
rounding ties turn on them, and every turned code moves all that follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphq.evaluate.taps import Taps, session
from graphq.graph.integer_ops import QGEMM, QMATMUL, name_in_file
from graphq.graph.ops import QUANTIZE
from graphq.graph.view import is_float

# the optimizer moves a Q in front of an op that only moves data
MOVES = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Gather", "Expand"}


class SimulatedKernels(fx.Interpreter):
    """Interprets the integer kernels of a graph; what is float between them is computed by the runtime."""

    def __init__(self, gm: fx.GraphModule, taps: Taps) -> None:
        super().__init__(gm)
        results = pytree.tree_leaves(next(n for n in reversed(gm.graph.nodes) if n.op == "output").args[0])
        named = zip([n for n in results if isinstance(n, fx.Node)], taps.outputs, strict=False)
        self.outputs_of = dict(reversed(list(named)))  # what is given twice has its first name
        self.results = taps.outputs
        floats = [self._name(n) for n in gm.graph.nodes if n.target in (QGEMM, QMATMUL) and is_float(n)]
        self.dtypes = taps.dtypes | dict.fromkeys(floats, np.dtype(np.float32))
        self.islands = Islands(taps.model, self.dtypes)
        self.values: dict[str, np.ndarray] = {}

    def outputs(self, feed: dict[str, np.ndarray], inputs: Sequence[Any]) -> list[Tensor]:
        """What the whole model gives for one batch, which comes by name for the runtime and in order for the graph."""
        self.values = dict(feed)
        self.run(*inputs)
        return [torch.from_numpy(self.islands.compute(name, self.values)) for name in self.results]

    def run_node(self, n: fx.Node) -> Any:
        name = self._name(n)
        rounded = self.islands.rounded(name) if n.target is QUANTIZE else None
        value = super().run_node(n) if rounded is None else self._quantize(n, name, *rounded)
        if name in self.dtypes:
            self.values[name] = self._given(value, name)
        return value

    def _quantize(self, n: fx.Node, name: str, source: str, codes: str) -> Tensor:
        """Codes of a float value of the runtime, moved about as the runtime does it."""
        x = torch.from_numpy(self.islands.compute(source, self.values))
        value: Tensor = QUANTIZE(x, *self.fetch_args_kwargs_from_env(n)[0][1:])
        if codes == name:
            return value
        start = {**self.values, codes: self._given(value, name)}
        moved = torch.from_numpy(self.islands.compute(name, start, after=codes))
        return moved if moved.dtype == value.dtype else (moved.int() - 128).to(value.dtype)

    def _name(self, n: fx.Node) -> str:
        return self.outputs_of.get(n) or name_in_file(n)

    def _given(self, value: Tensor, name: str) -> np.ndarray:
        """A kernel's result in the dtype that it has in the runtime: x86 turns s8 into u8."""
        array, dtype = value.contiguous().numpy(), self.dtypes[name]
        return (array.astype(np.int16) + 128).astype(dtype) if (array.dtype, dtype) == (np.int8, np.uint8) else array


class Islands:
    """Computes values of an optimized model from its inputs and from the results of its integer kernels.

    kernels: dtypes of the values that are given from outside (codes, and floats that integer kernels make), by name.
    """

    def __init__(self, model: onnx.ModelProto, kernels: Mapping[str, np.dtype[Any]]) -> None:
        self.model, self.kernels = model, kernels
        self._made = {name: node for node in model.graph.node for name in node.output}
        self._constants = {i.name: i for i in model.graph.initializer}
        self._inputs = {i.name: i for i in model.graph.input}
        self._sessions: dict[tuple[str, str], tuple[list[str], Any]] = {}

    def rounded(self, codes: str) -> tuple[str, str] | None:
        """(float value, codes) of the QuantizeLinear that makes these codes, here or before they were moved about;
        None where an integer kernel makes them."""
        node = self._made.get(codes)
        while node is not None and node.op_type in MOVES:
            node = self._made.get(node.input[0])
        return (node.input[0], node.output[0]) if node is not None and node.op_type == "QuantizeLinear" else None

    def compute(self, name: str, given: Mapping[str, np.ndarray], after: str = "") -> np.ndarray:
        """The value of that name; `given` holds the model's inputs, the results of the kernels before it, and `after`,
        one more value to start from."""
        if name in given:
            return given[name]
        if (name, after) not in self._sessions:
            self._sessions[name, after] = self._island(name, after)
        reads, run = self._sessions[name, after]
        value: np.ndarray = run.run([name], {n: given[n] for n in reads})[0]
        return value

    def _island(self, name: str, after: str) -> tuple[list[str], Any]:
        """(what it reads, a session of the ops between that and the value)."""
        inside: set[str] = set()
        reads, constants = dict[str, np.dtype[Any] | None](), dict[str, None]()
        waiting = [name]
        while waiting:
            value = waiting.pop()
            if value in self._constants:
                constants[value] = None
            elif value in self._inputs or (value and value == after) or (value in self.kernels and value != name):
                reads[value] = self.kernels.get(value, self.kernels.get(name))
            elif value and value not in inside:
                inside.update(self._made[value].output)
                waiting.extend(self._made[value].input)
        graph = onnx.GraphProto(name="island")
        graph.node.extend(n for n in self.model.graph.node if not inside.isdisjoint(n.output))
        graph.initializer.extend(self._constants[c] for c in constants)
        graph.input.extend(self._inputs[r] if r in self._inputs else _typed(r, dtype) for r, dtype in reads.items())
        graph.output.append(onnx.ValueInfoProto(name=name))
        model = onnx.ModelProto(graph=graph, ir_version=self.model.ir_version, opset_import=self.model.opset_import)
        return list(reads), session(model.SerializeToString(), optimize=False)


def _typed(name: str, dtype: Any) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(dtype), None)
