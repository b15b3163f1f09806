"""Carry out the decisions: a TensorQuantizer on every edge that is to be quantized.

A tensor has one quantizer, however many ops read it (one Q, many DQs). Where an integer kernel makes the tensor, all
readers get the quantized value, since a second, float reader would keep the kernel from fusing; a float tensor keeps
its float readers. An op that only moves data calls the quantizer of its input again: one scale, by identity.
"""

from __future__ import annotations

from torch import fx, nn

from graphq.config import QuantSpec
from graphq.errors import ConfigError
from graphq.graph.decision import Decision, decision_of
from graphq.graph.ops import HERE
from graphq.graph.passes import finish
from graphq.graph.view import parameter, value_of
from graphq.quantizer import TensorQuantizer

FOLDER = "quantizers"


def insert_quantizers(gm: fx.GraphModule) -> None:
    """Insert quantizers as the decisions say; the graph computes the same until they are calibrated."""
    gm.add_submodule(FOLDER, nn.ModuleDict())
    placer = _Placer(gm)
    for node in list(gm.graph.nodes):
        decision = decision_of(node)
        if node.target is HERE:
            placer.here(node, decision)
            continue
        if decision is None or decision.action in ("float", "skip", "fuse"):
            continue
        placer.place(node, decision)
    finish(gm)


class _Placer:
    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.placed: dict[fx.Node, fx.Node] = {}  # tensor → the node that quantizes it

    def place(self, node: fx.Node, decision: Decision) -> None:
        for source, spec in decision.inputs.items():
            quantized = self.quantized(source, spec)
            for member in decision.members:
                member.replace_input_with(source, quantized)
        if decision.weight is not None and decision.weight_spec is not None:
            for weight in (decision.weight, *decision.more_weights):
                quantized = self.quantized(weight, decision.weight_spec, decision.weight_axis, constant=True)
                node.replace_input_with(weight, quantized)
        if decision.action == "carry":
            self._carry(node)
        elif decision.output is not None:
            root = decision.members[0]
            self._redirect(root, self.quantized(root, decision.output))

    def here(self, node: fx.Node, decision: Decision | None) -> None:
        """A registered module's place: a quantizer stands there, or nothing."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if decision is not None and decision.inputs:
            source = self.placed[node] = self.quantized(source, decision.inputs[source], 0)
        node.replace_all_uses_with(source)
        self.gm.graph.erase_node(node)

    def quantized(
        self, tensor: fx.Node, spec: QuantSpec, channel_axis: int | tuple[int, ...] = -1, *, constant: bool = False
    ) -> fx.Node:
        """The node that quantizes a tensor; made once."""
        if tensor not in self.placed:
            constant = constant or parameter(self.gm, tensor) is not None
            rank, label = value_of(tensor).ndim, _label(tensor)
            again = None
            if spec.then is not None:
                block = spec.then.block_for(rank, channel_axis)
                again = TensorQuantizer(spec.then, block, f"{label}, again", constant=constant)
            quantizer = TensorQuantizer(spec, spec.block_for(rank, channel_axis), label, constant=constant, then=again)
            name = tensor.name
            self.gm.get_submodule(FOLDER).add_module(name, quantizer)
            self._call(f"{FOLDER}.{name}", tensor)
        self._expect_same(tensor, spec)
        return self.placed[tensor]

    def _expect_same(self, tensor: fx.Node, spec: QuantSpec) -> None:
        """One tensor has one quantizer; that its readers ask for other numbers must not go unheard."""
        found = self.gm.get_submodule(str(self.placed[tensor].target))
        assert isinstance(found, TensorQuantizer)
        if _numbers(found.spec) != _numbers(spec):
            raise ConfigError(
                f"what reads this tensor asks for {found.spec} and for {spec}",
                where=_label(tensor),
                remedy="Let one rule decide on all layers that read it.",
            )

    def _call(self, target: str, tensor: fx.Node) -> None:
        with self.gm.graph.inserting_after(tensor):
            call = self.gm.graph.call_module(target, (tensor,))
        call.meta = {"val": tensor.meta.get("val"), "nn_module_stack": tensor.meta.get("nn_module_stack")}
        self.placed[tensor] = call

    def _carry(self, node: fx.Node) -> None:
        """Quantize the result by the quantizer of the input."""
        source = next(a for a in node.all_input_nodes if a.op == "call_module")
        self._call(str(source.target), node)
        self._redirect(node, self.placed[node])

    def _redirect(self, tensor: fx.Node, quantized: fx.Node) -> None:
        """Everything that reads the float tensor reads the quantized one."""
        tensor.replace_all_uses_with(quantized, delete_user_cb=lambda user: user is not quantized)


def _numbers(spec: QuantSpec) -> QuantSpec:
    """A spec apart from who finds the range."""
    return spec.model_copy(update={"observer": "", "observer_args": {}})


def _label(tensor: fx.Node) -> str:
    """What a reader calls this tensor: the parameter's name, or the module path and op that make it."""
    if tensor.op == "get_attr":
        return str(tensor.target)
    if tensor.op == "placeholder":
        return f"input {tensor.target}"
    stack = tensor.meta.get("nn_module_stack") or {}
    path = next(reversed([p for p, _ in stack.values()]), "") if stack else ""
    return f"output of {path or '(model)'} ({tensor.name})"
