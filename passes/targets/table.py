"""What a target is: data. Which kernels it has for which ops, what they ask for, and why the rest stays float."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import fx

from graphq.config.scheme import Scheme
from graphq.config.spec import QuantSpec
from graphq.errors import TargetError, did_you_mean
from graphq.graph.match import Match
from graphq.registry import Registry

Role = Literal["compute", "between", "carry"]
Output = Literal["required", "optional"]
Bias = Literal["int32", "float"]
Cpu = Literal["auto", "avx2", "vnni", "arm"]


@dataclass(frozen=True)
class Kernel:
    """One row: an integer kernel, or an op that may run on integers.

    name: the runtime's op, as the optimized model shows it.
    role: "compute" asks for quantized inputs; "between" is worth it only between integer ops; "carry" moves data and
        keeps the scale of its input.
    output: whether the result must be quantized for the kernel to be chosen.
    bias: the form of the bias that the kernel takes.
    when: why this row does not fit a match, or None.
    inputs: the activations that the kernel wants quantized, where it is not all of them.
    within: the op in whose kernel this one is computed, if that is quantized.
    range: of the result, where the kernel computes well with that only; it is not observed then.
    """

    name: str
    role: Role
    output: Output = "required"
    bias: Bias = "int32"
    when: Callable[[Match], str | None] = lambda m: None
    inputs: Callable[[Match], Sequence[fx.Node]] | None = None
    within: Callable[[Match], fx.Node] | None = None
    range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for value, known in ((self.role, Role), (self.output, Output), (self.bias, Bias)):
            if value not in get_args(known):
                remedy = did_you_mean(value, get_args(known))
                raise TargetError(f"{value!r} is not a word of a kernel's row", where=self.name, remedy=remedy)


@dataclass(frozen=True)
class PackedKernel:
    """One row: a kernel that reads a packed weight beside float inputs.

    when: why this row does not fit a match with this spec of the weight, or None.
    """

    name: str
    when: Callable[[Match, QuantSpec], str | None] = lambda m, spec: None


@dataclass(frozen=True)
class Target:
    """A runtime: its kernel table, the dtypes it takes, and the passes that lower a converted graph to its form.

    kernels: family of the op table → rows, the first that fits counts.
    float_reasons: family → why there is no integer kernel for it.
    weight_only: family → rows, the first that fits counts; where none does, the weight is dequantized in the model.
    dynamic: what inputs whose scales are found at run time may be → rows for them, by family.
    weight_only_notes: family → what the runtime makes of integer weights with float inputs.
    opens_attention: it has kernels for the products and the softmax of an attention, none for the whole.
    lowering: a converted graph → its form for export. reference: → the exact arithmetic of its kernels.
    patterns: QuantPatterns of its own, tried before the built-in ones. translations: op → onnxscript function that
        writes it, for ops that torch.onnx does not know.
    activation_formats, weight_formats: what its kernels take; None: every format there is, with every granularity.
    weight_granularities: of weights beside quantized inputs.
    options: what it was made with, `get_target(name, **options)` makes it again.
    symmetric_only: activations have zero point 0 and signed codes; affine specs are taken for their symmetric forms.
    refuses: why no kernel takes the specs of a scheme together, or None.
    executor: whose optimizer `verify` and `explain` ask on this machine; "": none, files are taken at their word.
    suffix: of the files that it reads: ONNX models, or programs of torch.export.
    saturates: its u8·s8 kernels add adjacent products in saturating int16, and weights are to be chosen so that none
        does (`cpu` says which machine was meant). even_channels: they fill up an odd number of input channels, so that
        no pair crosses from one kernel position to the next. guards_by_data: for inputs like those of calibration.
    """

    name: str
    cpu: str
    kernels: Mapping[str, Sequence[Kernel]]
    float_reasons: Mapping[str, str]
    weight_only_notes: Mapping[str, str]
    activation_formats: frozenset[str] | None
    weight_formats: frozenset[str] | None
    saturates: bool
    lowering: Callable[[fx.GraphModule], fx.GraphModule]
    reference: Callable[[fx.GraphModule], fx.GraphModule]
    opens_attention: bool = False
    weight_granularities: frozenset[str] = frozenset({"tensor", "channel"})
    weight_only: Mapping[str, Sequence[PackedKernel]] = field(default_factory=dict)
    dynamic: Mapping[QuantSpec, Mapping[str, Sequence[Kernel]]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    patterns: Sequence[type[Any]] = ()
    translations: Mapping[Any, Callable[..., Any]] = field(default_factory=dict)
    symmetric_only: bool = False
    refuses: Callable[[Scheme], str | None] = lambda scheme: None
    executor: Literal["onnxruntime", "openvino", "inductor", ""] = ""
    suffix: Literal[".onnx", ".pt2"] = ".onnx"
    even_channels: bool = False
    guards_by_data: bool = False

    def fit(self, scheme: Scheme) -> Scheme:
        """The scheme as this target takes it."""
        if not self.symmetric_only:
            return scheme
        return scheme.model_copy(update={k: symmetric_form(getattr(scheme, k)) for k in ("input", "output", "cache")})

    def dynamic_rows(self, spec: QuantSpec | None) -> Mapping[str, Sequence[Kernel]] | None:
        """The rows for inputs of that spec; None where it is static, or none of what this target knows."""
        if spec is None or not spec.dynamic:
            return None
        return next((rows for known, rows in self.dynamic.items() if _same_form(spec, known)), None)

    def kernel_for(self, family: str, match: Match, given: QuantSpec | None = None) -> tuple[Kernel | None, str]:
        """The first row that fits this match, or the reason why none does. given: what the inputs become."""
        reason = self.float_reasons.get(family, f"{self.name} has no integer kernel for {family}")
        rows = self.kernels
        if given is not None and given.dynamic and self.dynamic:
            known = self.dynamic_rows(given)  # others are refused, for the ops that have a kernel at all
            rows = next(iter(self.dynamic.values())) if known is None else known
            reason = f"{self.name} has no kernel for {family} that finds scales at run time"
        for row in rows.get(family, ()):
            refusal = row.when(match)
            if refusal is None:
                return row, ""
            reason = refusal
        return None, reason

    def packed_kernel_for(self, family: str, match: Match, spec: QuantSpec) -> tuple[str, str]:
        """(the first kernel that reads this weight packed, ""), or ("", why none does)."""
        reasons = []
        for row in self.weight_only.get(family, ()):
            refusal = row.when(match, spec)
            if refusal is None:
                return row.name, ""
            reasons.append(refusal)
        return "", "; ".join(reasons)


DYNAMIC_FORM = ("format", "symmetric", "granularity", "axis", "group_size", "scale", "dynamic", "rounding", "saturate",
                "narrow_range", "then")  # fmt: skip


def _same_form(spec: QuantSpec, other: QuantSpec) -> bool:
    return all(getattr(spec, k) == getattr(other, k) for k in DYNAMIC_FORM)


def symmetric_form(spec: QuantSpec | None) -> QuantSpec | None:
    """An affine spec with signed codes and zero point 0; others stay as they are."""
    if spec is None or spec.symmetric:
        return spec
    return spec.model_copy(update={"symmetric": True, "format": spec.format.removeprefix("u")})


TARGETS: Registry[Callable[..., Target]] = Registry("target", "graphq.targets")
