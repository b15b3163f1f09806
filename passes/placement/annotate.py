"""Decide on every op: what becomes of it, by which rule and kernel, and why. Nothing is changed yet.

1. One walk from the outputs finds the patterns; each match becomes a Group of ops that one kernel computes.
2. The config gives each group a scheme, the target's table a kernel (or the reason why there is none).
3. Groups that pay off only among integers ("between", "carry") are settled together: all start as integers, and one
   that lacks an integer producer or an integer consumer is dropped, until none is.
4. Every op gets its Decision.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import cache

from torch import Tensor, fx

from graphq.config import QuantConfig, QuantSpec, Resolution, Scheme
from graphq.errors import TargetError
from graphq.graph.decision import KEY, Decision
from graphq.graph.match import Match, RuleIndex
from graphq.graph.ops import HERE
from graphq.graph.optable import family_of
from graphq.graph.plugins import plugins_of
from graphq.graph.view import LayerView, is_float, layers, value_of

from ..patterns import PATTERNS, QuantPattern
from ..targets.table import Kernel, Target
from .expressible import check_activation, check_weight, refuse


@dataclass
class Group:
    """The ops of one pattern match, with what is known about it so far."""

    pattern: type[QuantPattern]
    match: Match
    head: fx.Node
    root: fx.Node
    activations: list[fx.Node]
    resolution: Resolution
    scheme: Scheme  # as the target takes it
    kernel: Kernel | None
    reason: str  # why it stays float; "" while it may be quantized
    members: list[fx.Node] = field(default_factory=list)

    @property
    def integer(self) -> bool:
        return self.kernel is not None and not self.reason

    @property
    def role(self) -> str:
        return self.kernel.role if self.kernel else ""


def annotate(gm: fx.GraphModule, config: QuantConfig, target: Target) -> None:
    """Write a Decision on every op of the graph. Raises ConfigError for a selector that matches nothing, TargetError
    for a spec that the target cannot express."""
    views = layers(gm)
    config.check(views)  # type: ignore[arg-type]
    groups = _find_groups(gm, config, target)
    by_root = {g.root: g for g in groups}
    for group in groups:
        if group.kernel is not None and group.kernel.within is not None:
            within = by_root.get(group.kernel.within(group.match))
            if within is None or not within.integer:
                group.reason = group.reason or "the layer that would compute it stays float"
    _settle(groups, by_root)
    for node in gm.graph.nodes:
        if node.op == "call_function":
            node.meta[KEY] = _default_decision(LayerView(gm, node), config, target)
    for group in groups:
        _write(group, target)
    for node in gm.graph.find_nodes(op="call_function", target=HERE):
        node.meta[KEY] = _where_asked(LayerView(gm, node), config, target)


def _where_asked(view: LayerView, config: QuantConfig, target: Target) -> Decision:
    """A place that a registered module has for a quantizer: by its name it is of the weight, the output or an input."""
    resolution, name = config.resolve(view), view.path.rpartition(".")[2]
    scheme = target.fit(resolution.scheme or Scheme())
    spec = {"weight_quantizer": scheme.weight, "output_quantizer": scheme.output}.get(name, scheme.input)
    if spec is None:
        reason = f"the scheme says nothing of {name}" if resolution.scheme else resolution.because
        return Decision("float", reason, rule=resolution.because, pattern="register")
    if name == "weight_quantizer":
        check_weight(spec, target, f"scheme of {view.path}")
    else:
        check_activation(spec, target, f"scheme of {view.path}")
    source = view.node.args[0]
    assert isinstance(source, fx.Node)
    reason = "a registered module asks for it"
    inputs = {source: spec}
    return Decision("quantize", reason, resolution.because, "register", "float", members=[view.node], inputs=inputs)


def _find_groups(gm: fx.GraphModule, config: QuantConfig, target: Target) -> list[Group]:
    index = _index((*target.patterns, *plugins_of(QuantPattern), *PATTERNS))
    claimed: set[fx.Node] = set()
    groups = []
    for node in reversed(gm.graph.nodes):
        if node in claimed or not _floats(node):
            continue
        refusals = []
        for pattern, match in ((p, m) for p, found in index.at(gm, node) for m in itertools.islice(found, 1)):
            if any(n in claimed for n in match.nodes):
                continue
            refusal = pattern.check(match) or _not_absorbed(gm, pattern, match, config, target)
            if refusal is not None and len(match.nodes) > 1:
                continue  # a smaller pattern may still fit
            if refusal is not None:
                refusals.append(refusal)
                continue
            group = _group(gm, pattern, match, config, target)
            if len(match.nodes) > 1 and (group.kernel is None or ("activation" in match and not _ends_in_codes(group))):
                continue
            claimed |= set(group.members)
            groups.append(group)
            break
        else:
            if refusals:
                node.meta["graphq_refusal"] = refusals[0]
    groups.reverse()
    return groups


@cache
def _index(patterns: tuple[type[QuantPattern], ...]) -> RuleIndex:
    """Patterns are compiled once, however many models are quantized."""
    return RuleIndex(patterns)


def _not_absorbed(
    gm: fx.GraphModule, pattern: type[QuantPattern], match: Match, config: QuantConfig, target: Target
) -> str | None:
    """Why the codes of the result do not stop at zero, so that the kernel cannot skip a relu; or None."""
    if "activation" not in match:
        return None
    scheme = target.fit(config.resolve(LayerView(gm, match.node(pattern.head))).scheme or Scheme())
    spec = scheme.output or scheme.input
    return "a symmetric scale has codes below zero" if spec is not None and spec.symmetric else None


def _ends_in_codes(group: Group) -> bool:
    """Is the result quantized right behind the kernel? Only then does it skip the activation."""
    return group.kernel is not None and (group.kernel.output == "required" or group.scheme.output is not None)


def _floats(node: fx.Node) -> bool:
    value = value_of(node)
    if isinstance(value, (list, tuple)):
        return bool(value) and isinstance(value[0], Tensor) and value[0].is_floating_point()
    return is_float(node)


def _group(gm: fx.GraphModule, pattern: type[QuantPattern], match: Match, config: QuantConfig, target: Target) -> Group:
    head = match.node(pattern.head)
    resolution = config.resolve(LayerView(gm, head))
    activations: list[fx.Node] = []
    for name in pattern.activations:
        bound = match.node(name)
        activations += bound if isinstance(bound, (list, tuple)) else [bound]
    scheme = target.fit(resolution.scheme or Scheme())
    kernel, reason = target.kernel_for(pattern.family, match, scheme.input)
    if kernel is not None:
        asked = resolution.scheme is not None
        reason = refuse(pattern, kernel, scheme, target, match) if asked else resolution.because
        if kernel.inputs is not None:
            activations = list(kernel.inputs(match))
    group = Group(pattern, match, head, match.nodes[0], activations, resolution, scheme, kernel, reason)
    group.members = list(match.nodes)
    return group


def _settle(groups: list[Group], by_root: dict[fx.Node, Group]) -> None:
    """Drop "between" and "carry" groups that are not between integers; the largest set that is consistent stays."""
    while True:
        produced = _integer_producers(groups, by_root)
        consumed = _integer_consumers(groups)
        dropped = 0
        for g in groups:
            if not g.integer or g.role == "compute":
                continue
            if not any(a in produced for a in g.activations):
                g.reason, dropped = "its inputs come from float ops", dropped + 1
            elif g.root not in consumed:
                g.reason, dropped = "its result goes to float ops only", dropped + 1
        if not dropped:
            return


def _integer_producers(groups: list[Group], by_root: dict[fx.Node, Group]) -> set[fx.Node]:
    """Results that come out of a kernel as codes; groups are in topological order."""
    produced: set[fx.Node] = set()
    for g in groups:
        if not g.integer:
            continue
        if g.role == "compute":
            if _ends_in_codes(g):
                produced.add(g.root)
        elif any(a in produced for a in g.activations):
            produced.add(g.root)
    return produced


def _integer_consumers(groups: list[Group]) -> set[fx.Node]:
    """Results that an integer kernel reads, directly or through ops that only move data."""
    consumed: set[fx.Node] = set()
    for g in reversed(groups):
        if g.integer and (g.role == "compute" or g.root in consumed):
            consumed.update(g.activations)
    return consumed


def _default_decision(view: LayerView, config: QuantConfig, target: Target) -> Decision:
    """For ops that no pattern covers."""
    node = view.node
    if not _floats(node) and view.family != "getitem":
        return Decision("skip", "it computes shapes, indices or conditions")
    refusal = node.meta.pop("graphq_refusal", None)
    reason = refusal or target.float_reasons.get(view.family, f"{target.name} has no integer kernel for {view.family}")
    return Decision("float", reason, rule=config.resolve(view).because)


def _write(group: Group, target: Target) -> None:
    """The decisions on the ops of one group."""
    scheme, kernel = group.scheme, group.kernel
    decision = Decision("float", group.reason, rule=group.resolution.because, pattern=group.pattern.__name__)
    decision.weight_axis, decision.members = group.pattern.weight_axis, group.members
    if group.integer and kernel is not None:
        decision.action = "carry" if kernel.role == "carry" else "quantize"
        decision.kernel = kernel.name
        decision.reason = {
            "compute": "the kernel takes integers",
            "between": "it stands between integer ops",
            "carry": "it moves codes about without changing them",
        }[kernel.role]
        if scheme != (group.resolution.scheme or scheme):
            decision.reason += f"; {target.name} takes zero point 0 only: symmetric where affine was asked for"
        decision.inputs = _inputs(group)
        if kernel.role != "carry" and (kernel.output == "required" or scheme.output is not None):
            decision.output = _in_range(scheme.output or scheme.input, kernel)
        decision.bias_form = kernel.bias
        _take_weight(decision, group, scheme)
    elif group.pattern.weight and scheme.weight is not None and _weight_alone(group, scheme.weight, target):
        _take_packed(decision, group, scheme.weight, target)
        _take_weight(decision, group, scheme)
    for node in group.members:
        node.meta[KEY] = decision if node is group.head else _fused(node, decision, group)


def _inputs(group: Group) -> dict[fx.Node, QuantSpec]:
    cached = {group.match.node(name) for name in group.pattern.cached}
    specs = {a: (a in cached and group.scheme.cache) or group.scheme.input for a in group.activations}
    return {a: spec for a, spec in specs.items() if spec is not None}


def _in_range(spec: QuantSpec | None, kernel: Kernel) -> QuantSpec | None:
    """The spec of a result, with the range that the kernel wants."""
    if spec is None or kernel.range is None:
        return spec
    lo, hi = kernel.range
    return spec.model_copy(update={"observer": "fixed", "observer_args": {"lo": lo, "hi": hi}})


def _weight_alone(group: Group, spec: QuantSpec, target: Target) -> bool:
    """Is the weight quantized although the inputs stay float? A table has no inputs: it is where a kernel reads it
    packed, whatever the scheme says of inputs."""
    if group.scheme.input is None:
        return True
    family = family_of(group.head.target)
    return not group.activations and bool(target.packed_kernel_for(family, group.match, spec)[0])


def _take_packed(decision: Decision, group: Group, spec: QuantSpec, target: Target) -> None:
    """A weight beside float inputs: read packed by a kernel, or dequantized in the model."""
    family = family_of(group.head.target)
    decision.kernel, refusal = target.packed_kernel_for(family, group.match, spec)
    if not decision.kernel and target.weight_only and spec.granularity not in ("tensor", "channel"):
        raise TargetError(
            f"{target.name} has no form for the weight of this {family}: {refusal or 'no kernel reads it packed'}",
            where=group.match.root.where(),
            remedy="Use granularity 'channel', or let the rule select other layers.",
        )
    note = "the kernel reads it packed" if decision.kernel else target.weight_only_notes.get(family, "")
    decision.action = "weight_only"
    what = "the scheme quantizes weights only" if group.scheme.input is None else "a table is a weight without inputs"
    decision.reason = "; ".join(filter(None, [what, refusal, note]))


def _take_weight(decision: Decision, group: Group, scheme: Scheme) -> None:
    if group.pattern.weight:
        decision.weight, decision.weight_spec = group.match.node(group.pattern.weight), scheme.weight
        decision.more_weights = [group.match.node(name) for name in group.pattern.more_weights]
    if group.pattern.bias:
        decision.bias = group.match.node(group.pattern.bias)


def _fused(node: fx.Node, decision: Decision, group: Group) -> Decision:
    if decision.action != "quantize":
        return Decision("float", f"follows {group.head.name}: {decision.reason}", rule=decision.rule)
    return Decision("fuse", f"computed in the kernel of {group.head.name}", decision.rule, decision.pattern,
                    decision.kernel, head=group.head)  # fmt: skip
