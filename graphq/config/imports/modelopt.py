"""ModelOpt's `quant_cfg`: an ordered list of entries, or the older dict; the last that fits a quantizer wins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphq.config.config import QuantConfig, Rule
from graphq.config.imports import plain, take
from graphq.config.imports.algorithms import modelopt_algorithms
from graphq.config.known import LAYERS
from graphq.config.scheme import Scheme
from graphq.config.spec import QuantSpec
from graphq.errors import ConfigError

PARTS = {"weight_quantizer": "weight", "input_quantizer": "input", "output_quantizer": "output"}
FLOATS = {(4, 3): "fp8_e4m3", (5, 2): "fp8_e5m2", (3, 2): "fp6_e3m2", (2, 3): "fp6_e2m3", (2, 1): "fp4_e2m1"}
NAMES = {"e4m3": (4, 3), "e5m2": (5, 2), "e3m2": (3, 2), "e2m3": (2, 3), "e2m1": (2, 1), "e8m0": (8, 0)}
ATTRIBUTES = (
    "enable", "num_bits", "axis", "fake_quant", "unsigned", "narrow_range", "type", "block_sizes", "calibrator",
    "pass_through_bwd", "effective_bits", "trt_high_precision_dtype",
)  # fmt: skip


def from_modelopt(config: Mapping[str, Any], *, name: str = "modelopt") -> QuantConfig:
    """config: {"quant_cfg": list or dict, "algorithm": "max"}. Raises ConfigError for what has no counterpart."""
    fields = take(plain(config), "a ModelOpt config", ("quant_cfg", "algorithm"))
    entries = fields["quant_cfg"]
    rules = [r for e in (_entries(entries) if isinstance(entries, Mapping) else entries) for r in _rules(e)]
    return QuantConfig(name=name, rules=tuple(rules), algorithms=modelopt_algorithms(fields.get("algorithm", "max")))


def _entries(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The older form: quantizer name → attributes, class name → {quantizer name → attributes}, "default"."""
    listed: list[dict[str, Any]] = []
    for key, value in config.items():
        if key.startswith("nn."):
            listed += [{"quantizer_name": q, "parent_class": key, **_split(a)} for q, a in value.items()]
        else:
            listed.append({"quantizer_name": "*" if key == "default" else key, **_split(value)})
    return sorted(listed, key=lambda e: e["quantizer_name"] != "*" or "parent_class" in e)  # the default first


def _split(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping) and set(value) == {"enable"}:
        return {"enable": value["enable"]}
    return {"cfg": value}


def _rules(entry: Any) -> list[Rule]:
    e = take(plain(entry), "an entry of quant_cfg", ("quantizer_name", "parent_class", "cfg", "enable"))
    pattern, why = e["quantizer_name"], f"ModelOpt's {e['quantizer_name']!r}; there the last entry wins"
    if "bmm_quantizer" in pattern or "softmax_quantizer" in pattern:
        raise ConfigError(f"{pattern!r} quantizes inside of attention", remedy="Use a rule on 'attention' or 'matmul'.")
    part = next((p for q, p in PARTS.items() if pattern.endswith(q)), None)
    prefix = pattern.removesuffix(next((q for q, p in PARTS.items() if p == part), "")).rstrip(".") or "*"
    where = LAYERS if prefix in ("*", "*.") else prefix
    if "parent_class" in e:
        where = e["parent_class"].removeprefix("nn.") + ("" if prefix == "*" else f" & {prefix}")
    only: Any = (part,) if part else None
    optional = part is None or prefix != "*"
    cfg = e.get("cfg")
    if not e.get("enable", True) or (isinstance(cfg, Mapping) and cfg.get("enable") is False):
        return [Rule(select=where, scheme=None, only=only, optional=True, reason=why)]
    if part is None or cfg is None:
        raise ConfigError(
            f"{pattern!r} does not say which tensor it is about", remedy=f"Let it end in one of {list(PARTS)}."
        )
    spec = sequence_of(cfg) if isinstance(cfg, (list, tuple)) else spec_of(cfg)
    if part == "weight":  # there "dynamic" blocks of weights are found at every call: for a constant it is the same
        spec = spec.model_copy(update={"dynamic": False})
    return [Rule(select=where, scheme=Scheme(**{part: spec}), only=only, optional=optional, reason=why)]


def sequence_of(configs: Any) -> QuantSpec:
    """Several formats one after the other (SequentialQuantizer)."""
    spec: QuantSpec | None = None
    for cfg in reversed(configs):
        spec = spec_of(cfg).model_copy(update={"then": spec})
    if spec is None:
        raise ConfigError("an empty list of formats", remedy="Leave the entry out.")
    return spec


def spec_of(cfg: Any) -> QuantSpec:
    """QuantizerAttributeConfig as a spec: integers by the largest code (127, 7), blocks by their sizes."""
    a = take(plain(cfg), "a quantizer's attributes", ATTRIBUTES)
    bits = a.get("num_bits", 8)
    pair = NAMES.get(bits) if isinstance(bits, str) else tuple(bits) if isinstance(bits, (list, tuple)) else None
    if pair is None and not isinstance(bits, int):
        raise ConfigError(f"num_bits {bits!r} is no known format", remedy=f"An integer, or one of {list(NAMES)}.")
    if pair is not None and pair not in FLOATS:
        raise ConfigError(f"there is no float format with {pair} exponent and mantissa bits", remedy=f"{list(FLOATS)}.")
    unsigned = "u" if a.get("unsigned") else ""
    fields: dict[str, Any] = {
        "format": FLOATS[pair] if pair else f"{unsigned}int{bits}",
        "narrow_range": bool(a.get("narrow_range", False)),
        "dynamic": a.get("type") == "dynamic",
    }
    if a.get("axis") is not None:
        fields |= {"granularity": "channel", "axis": a["axis"]}
    if "block_sizes" in a:
        fields |= _blocks(dict(a["block_sizes"]), fields["format"])
        if a.get("type") == "dynamic" and fields.get("group_size", 0) is None:
            fields = {**fields, "granularity": "token", "dynamic": True}
            del fields["group_size"]
    if fields.get("granularity") == "token":
        fields.pop("axis", None)
    return QuantSpec(**fields)


def _blocks(sizes: dict[Any, Any], format: str) -> dict[str, Any]:
    """block_sizes {axis: size or None, "type", "scale_bits"} as fields of a spec."""
    dynamic = sizes.pop("type", "static") == "dynamic"
    scale = sizes.pop("scale_bits", None)
    scale = NAMES.get(scale, scale) if isinstance(scale, str) else scale
    kinds = {None: "float", (8, 0): "e8m0", (4, 3): "e4m3"}
    key = tuple(scale) if isinstance(scale, (list, tuple)) else scale
    if key not in kinds or any(not isinstance(k, int) and not str(k).lstrip("-").isdigit() for k in sizes):
        raise ConfigError(f"block_sizes with {sizes} and scale_bits {scale} is not understood", remedy="See ModelOpt.")
    axes = {int(k): v for k, v in sizes.items()}
    fields: dict[str, Any] = {"scale": kinds[key]} | ({"scale_mode": "cover"} if kinds[key] == "e8m0" else {})
    if set(axes) == {-1}:
        fields |= {"granularity": "group", "group_size": axes[-1]}
    elif set(axes) == {-1, -2}:
        fields |= {"granularity": "block", "block": (axes[-2], axes[-1]), "ragged": True}
    else:
        raise ConfigError(f"blocks along the axes {sorted(axes)}", remedy="Use axis -1, or -1 and -2.")
    if format == "int8" and fields["scale"] == "e8m0":
        fields["narrow_range"] = True
    fields["dynamic"] = ("local" if fields["scale"] == "e4m3" else True) if dynamic else False
    return fields
