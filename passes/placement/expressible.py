"""What a target can express: why a scheme leaves an op float, and errors for specs that no kernel takes."""

from __future__ import annotations

from graphq.config import QuantSpec, Scheme
from graphq.errors import TargetError
from graphq.graph.match import Match

from ..patterns import QuantPattern
from ..targets.table import Kernel, Target


def refuse(pattern: type[QuantPattern], kernel: Kernel, scheme: Scheme, target: Target, match: Match) -> str:
    """Why a group with a kernel and a scheme stays float, or ''."""
    if pattern.weight and scheme.weight is not None:
        check_weight(scheme.weight, target, f"scheme of {match.root.where()}")
    if target.activation_formats is None:  # no kernels: any part of a scheme alone can be simulated
        return _refuse_simulated(pattern, scheme, match)
    if scheme.input is None:
        return "the scheme quantizes weights only" if pattern.weight else "the scheme leaves activations float"
    if pattern.weight and scheme.weight is None:
        return "the scheme leaves its weight float, and the kernel wants integers on both sides"
    if pattern.bias and kernel.bias == "int32" and match.node(pattern.bias) and match.tensor(pattern.bias) is None:
        return "its bias is computed, and the kernel adds one that is known as integers"
    where = f"scheme of {match.root.where()}"
    check_activation(scheme.input, target, where)
    if scheme.output is not None:
        check_activation(scheme.output, target, where)
    if scheme.bias is not None and scheme.bias.format != "int32":
        raise TargetError(
            f"no kernel of {target.name} adds biases as {scheme.bias.format}",
            where=where,
            remedy="Leave bias out: int32.",
        )
    axis = scheme.weight.axis if scheme.weight is not None and pattern.weight else None
    if axis is not None and axis != pattern.weight_axis:
        raise TargetError(
            f"no kernel of {target.name} takes weight scales along axis {axis} of {pattern.family}",
            where=where,
            remedy=f"Leave axis out: the output channels are axis {pattern.weight_axis}.",
        )
    together = target.refuses(scheme) if pattern.weight else None
    if together is not None:
        raise TargetError(f"no kernel of {target.name} takes this scheme: {together}", where=where,
                          remedy="Change the scheme, or let the rule select other layers.")  # fmt: skip
    if target.weight_formats is None or scheme.weight is None or not pattern.weight:
        return ""
    if scheme.weight.granularity not in target.weight_granularities:
        raise TargetError(
            f"no integer kernel of {target.name} takes weights with a scale per {scheme.weight.granularity}",
            where=where,
            remedy="Use granularity 'channel' or 'tensor', or a scheme without input (weight only).",
        )
    return ""


def _refuse_simulated(pattern: type[QuantPattern], scheme: Scheme, match: Match) -> str:
    asked = [s for s in (scheme.input, scheme.output, scheme.cache if pattern.cached else None) if s is not None]
    for spec in asked:
        _check_static_groups(spec, f"scheme of {match.root.where()}")
    if asked:
        return ""
    return "the scheme quantizes weights only" if pattern.weight else "the scheme leaves activations float"


def check_weight(spec: QuantSpec, target: Target, where: str) -> None:
    """Raises TargetError for the spec of a weight that the target cannot express."""
    if target.weight_formats is None:
        return
    if spec.format not in target.weight_formats or spec.then is not None:
        raise TargetError(
            f"{target.name} has no kernels for weights in {spec.format}{', then another format' if spec.then else ''}",
            where=where,
            remedy=f"Use one of: {', '.join(sorted(target.weight_formats))}; target 'simulation' takes every format.",
        )
    if spec.dynamic:
        raise TargetError("the range of a weight is known", where=where, remedy="dynamic: false for weights.")


def _check_static_groups(spec: QuantSpec, where: str) -> None:
    if spec.granularity in ("group", "block") and not spec.dynamic:
        raise TargetError(
            f"a static scale per {spec.granularity} needs activations of one size",
            where=where,
            remedy="dynamic: true (or 'local' for nvfp4) finds the scales of every call.",
        )


def check_activation(spec: QuantSpec, target: Target, where: str) -> None:
    """Raises TargetError for the spec of an activation that the target cannot express."""
    _check_static_groups(spec, where)
    if target.activation_formats is None:
        return
    if spec.dynamic:
        if target.dynamic_rows(spec) is not None:
            return
        raise TargetError(
            f"{target.name} has no kernels that find scales at run time for {spec}",
            where=where,
            remedy=f"Use {' or '.join(map(str, target.dynamic))}." if target.dynamic else "dynamic: false.",
        )
    if spec.format not in target.activation_formats:
        known = ", ".join(sorted(target.activation_formats))
        raise TargetError(f"{target.name} has no kernels for {spec.format} activations", where=where,
                          remedy=f"Use one of: {known}; target 'simulation' takes every format.")  # fmt: skip
    if spec.granularity != "tensor":
        raise TargetError(
            f"{target.name} fails at run time with a scale per {spec.granularity} on activations",
            where=where,
            remedy="Use granularity 'tensor' for input and output.",
        )
    if spec.narrow_range:
        raise TargetError(
            "ONNX's QuantizeLinear saturates to the whole format", where=where, remedy="narrow_range: false for input."
        )
