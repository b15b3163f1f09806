"""AMD Quark's QConfig: exclude beats layer names, these beat layer types, these beat the global config."""

from __future__ import annotations

from typing import Any

from graphq.config.config import QuantConfig, Rule
from graphq.config.imports import plain, take
from graphq.config.imports.algorithms import quark_algorithms
from graphq.config.known import LAYERS
from graphq.config.scheme import Scheme
from graphq.config.spec import QuantSpec
from graphq.errors import ConfigError
from graphq.numerics.formats import BLOCK_FORMATS, FORMATS

FORMAT_OF = {"fp4": "fp4_e2m1"}
OBSERVERS = {
    "PerTensorMinMaxObserver": "minmax", "PerChannelMinMaxObserver": "minmax", "PerGroupMinMaxObserver": "minmax",
    "PerBlockMXObserver": "minmax", "PlaceholderObserver": "minmax", "PerTensorPercentileObserver": "percentile",
    "PerTensorMSEObserver": "mse", "PerTensorHistogramObserver": "entropy",
}  # fmt: skip
ROUNDINGS = {"half_even": "half_even", "round": "half_away", "floor": "floor"}
LEVELS = (
    "global_quant_config", "layer_type_quant_config", "layer_quant_config", "exclude", "algo_config", "quant_mode",
)  # fmt: skip
PARTS = {"weight": "weight", "input_tensors": "input", "output_tensors": "output", "bias": "bias"}
FIELDS = (
    "dtype", "observer_cls", "symmetric", "scale_type", "round_method", "qscheme", "ch_axis", "is_dynamic",
    "group_size", "scale_format", "scale_calculation_mode", "mx_element_dtype", "block_size",
)  # fmt: skip


def from_quark(config: Any, *, name: str = "quark") -> QuantConfig:
    """config: the dict form of QConfig. Raises ConfigError for what has no counterpart."""
    c = take(plain(config), "a Quark config", LEVELS)
    rules: list[Rule] = []

    def add(select: str, layer: Any, level: str, optional: bool = False) -> None:
        why = f"Quark's {level}; exclude beats layer beats layer type beats global"
        rules.append(Rule(select=select, scheme=_scheme(layer), reason=why, optional=optional))

    if "global_quant_config" in c:
        add(LAYERS, c["global_quant_config"], "global config")
    for kind, layer in c.get("layer_type_quant_config", {}).items():
        add(kind.__name__ if isinstance(kind, type) else str(kind).rpartition(".")[2], layer, "layer type")
    for pattern, layer in c.get("layer_quant_config", {}).items():
        add(pattern, layer, "layer")
    for pattern in c.get("exclude", ()):
        rules.append(Rule(select=pattern, scheme=None, optional=True, reason="Quark's exclude, which beats all"))
    algorithms = quark_algorithms(c["algo_config"]) if c.get("algo_config") else ()
    return QuantConfig(name=name, rules=tuple(rules), algorithms=algorithms)


def _scheme(layer: Any) -> Scheme:
    fields = take(plain(layer), "a Quark layer config", tuple(PARTS))
    return Scheme(**{PARTS[k]: spec_of(v) for k, v in fields.items() if k in PARTS})


def _word(value: Any) -> str:
    """The name of an enum member ("Dtype.int8", <Dtype.int8>), a class, or a word."""
    text = getattr(value, "name", None) or getattr(value, "__name__", None) or str(value)
    return text.rpartition(".")[2]


def spec_of(spec: Any) -> QuantSpec:
    """QTensorConfig (QuantizationSpec) as a spec: integers by half of all codes."""
    if isinstance(spec, (list, tuple)):
        first, *rest = spec
        return spec_of(first).model_copy(update={"then": spec_of(rest)} if rest else {})
    s = take(plain(spec), "a Quark tensor config", FIELDS)
    dtype = _word(s.get("dtype", "int8"))
    if dtype == "mx":
        dtype = "mx" + _word(s["mx_element_dtype"])
    format = FORMAT_OF.get(dtype, dtype)
    if format not in FORMATS and format not in BLOCK_FORMATS:
        raise ConfigError(f"Quark's {dtype!r} has no counterpart", remedy="Use another dtype.")
    fields: dict[str, Any] = {"format": format, "dynamic": bool(s.get("is_dynamic", False))}
    if format in BLOCK_FORMATS:
        size = s.get("group_size") or s.get("block_size") or BLOCK_FORMATS[format]["group_size"]
        mode = {} if format in ("mx6", "mx9", "bfp16") else {"scale_mode": s.get("scale_calculation_mode") or "even"}
        return QuantSpec(**fields, group_size=size, axis=s.get("ch_axis"), **mode)
    granularity = _word(s.get("qscheme", "per_tensor")).removeprefix("per_")
    integer = "int" in format
    symmetric = bool(s.get("symmetric", True)) or not integer
    fields |= {
        "symmetric": symmetric,
        "granularity": granularity,
        "span": "full" if integer and symmetric else "positive",
        "observer": OBSERVERS.get(_word(s.get("observer_cls", "PlaceholderObserver")), ""),
        "rounding": ROUNDINGS[_word(s.get("round_method", "half_even"))],
    }
    if _word(s.get("scale_type", "float")) == "pof2":
        fields["scale"] = "pof2"
    if granularity == "group":
        fields |= {"group_size": s["group_size"], "axis": s.get("ch_axis", -1)}
        if s.get("scale_format") == "e8m0":
            fields |= {"scale": "e8m0", "scale_mode": s.get("scale_calculation_mode") or "even"}
    elif granularity == "channel":
        if fields["dynamic"]:  # a scale per row of the flattened activation
            fields["granularity"] = "token"
        else:
            fields["axis"] = s.get("ch_axis", 0)
    if not fields["observer"]:
        raise ConfigError(f"Quark's {_word(s['observer_cls'])} has no counterpart", remedy=f"One of {list(OBSERVERS)}.")
    return QuantSpec(**fields)
