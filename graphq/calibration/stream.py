"""All samples on their way through a graph, op by op, none ahead of the others.

What an op gives is kept for as long as a later op reads it: the frontier of all samples is in memory, and nothing
behind it; where a folder is given it lies there. Parameters are read when they are used, so that a weight that has been
replaced on the way is seen from there on; `original` sees the one that it replaced.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from graphq.calibration.batches import NO_DATA, batches_of, check_batch
from graphq.calibration.frontier import Frontier
from graphq.errors import CalibrationError
from graphq.graph.capture import example_of, flat_inputs
from graphq.graph.devices import device_of
from graphq.graph.on_disk import values_of
from graphq.graph.view import held
from graphq.numerics.products import linear
from graphq.observers.tokens import MASK, tokens_that_count

NOTHING: Mapping[fx.Node, Tensor] = {}
FASTER: dict[Any, Any] = {torch.ops.aten.linear.default: linear}


class Stream:
    """See `graphq.algorithms.base.Stream`. Raises CalibrationError for data that cannot be gone through in step."""

    def __init__(self, gm: fx.GraphModule, data: Any, *, original: bool = False, folder: Path | None = None) -> None:
        if callable(data) and not isinstance(data, Iterable):
            raise CalibrationError("this algorithm goes through the data op by op, and they are a function",
                                   remedy="Give an iterable of batches.")  # fmt: skip
        self.gm, self.at = gm, 0
        self.constants: dict[
            fx.Node, Tensor
        ] = {}  # of the ops that run now: those on disk are read once for all samples
        self.originals: dict[fx.Node, Tensor] = {}
        self.order = [n for n in gm.graph.nodes if not self._constant(n)]
        self.place = {n: i for i, n in enumerate(self.order)}
        if original:
            self.originals = {n: self._held(n) for n in gm.graph.nodes if self._constant(n)}
        self.last = {n: max((self.place[u] for u in n.users if u in self.place), default=-1) for n in self.order}
        device = device_of(gm)
        self.frontier = Frontier(folder, device)
        self.masks: list[Tensor | None] = []
        inputs = gm.graph.find_nodes(op="placeholder")
        for number, (args, kwargs) in enumerate(batches_of(data, device)):
            check_batch(gm, args, kwargs, number)
            given = zip(inputs, flat_inputs(gm, args, kwargs), strict=True)
            self.frontier.append({n: v for n, v in given if self.last[n] >= 0})
            mask = (dict(zip(example_of(gm).dynamic_shapes, args, strict=False)) | kwargs).get(MASK)
            self.masks.append(tokens_that_count(mask))
        if not len(self.frontier):
            raise CalibrationError("there is no calibration data: the iterable is empty", remedy=NO_DATA)

    @torch.no_grad()
    def until(self, node: fx.Node) -> list[Tensor]:
        stop, found = self.place[node] + 1, []
        self.constants.clear()  # of trials, after which weights may have been chosen
        for number in range(len(self.frontier)):
            values = self.frontier[number]
            if self.at < stop:
                for n in self.order[self.at : stop]:
                    self._step(n, values)
                self.frontier[number] = values
            found.append(values[node])
        self.at = max(self.at, stop)
        self.constants.clear()
        return found

    def trial(
        self, number: int, stop: fx.Node, read: Mapping[fx.Node, Tensor] = NOTHING, keep: Sequence[fx.Node] = ()
    ) -> dict[fx.Node, Any]:
        values = dict(self.frontier[number])
        kept = {n: values[n] for n in keep if n in values}
        for node in self.order[self.at : self.place[stop] + 1]:
            self._step(node, values, read)
            if node in keep:
                kept[node] = values[node]
        return values | kept

    def _step(self, node: fx.Node, values: dict[fx.Node, Any], read: Mapping[fx.Node, Tensor] = NOTHING) -> None:
        """read: weights in place of the graph's own."""
        if node.op == "placeholder":
            return
        given = {n: values[n] if n in values else read[n] if n in read else self._read(n) for n in node.all_input_nodes}
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: given[n])
        run = (
            self.gm.get_submodule(str(node.target))
            if node.op == "call_module"
            else FASTER.get(node.target, node.target)
        )
        values[node] = run(*args, **kwargs)  # type: ignore[operator]
        for n in node.all_input_nodes:
            if n in values and self.last[n] <= self.place[node]:
                del values[n]

    def _constant(self, node: fx.Node) -> bool:
        """A parameter, or a quantizer's call on one: nothing that calibration runs through."""
        return node.op == "get_attr" or (
            node.op == "call_module" and held(self.gm, node.all_input_nodes[0]) is not None
        )

    def _read(self, node: fx.Node) -> Tensor:
        if node not in self.constants:
            tensor = self.originals[node] if node in self.originals else self._held(node)
            self.constants[node] = values_of(tensor).detach()  # gradients of a trial are not for the model
        return self.constants[node]

    def _held(self, node: fx.Node) -> Tensor:
        source = node if node.op == "get_attr" else node.args[0]
        assert isinstance(source, fx.Node)
        tensor = held(self.gm, source)
        assert tensor is not None
        return tensor
