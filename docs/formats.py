"""The table of docs/formats.md: every format with every granularity, quantized and measured."""

import numpy as np
import torch

from graphq.config import QuantSpec
from graphq.errors import ConfigError
from graphq.export.standard import BLOCKED_OPSET, E8M0_OPSET, TYPES, WIDER
from graphq.numerics.affine import fake_quantize, range_of
from graphq.numerics.formats import BLOCK_FORMATS, FORMATS, Floating, Integer
from graphq.passes.targets import get_target

SHAPE = (2, 4, 64, 128)  # [batch, head, token, channel]
GRANULARITIES = {
    "tensor": {},
    "channel": {"axis": -1},
    "head": {},
    "token": {"dynamic": True},
    "group": {"group_size": 32},
    "block": {"block": (1, 1, 16, 32)},
}
ORT = get_target("onnxruntime", cpu="arm")


def sample() -> torch.Tensor:
    """Normal values, with channels of different sizes and a few outliers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SHAPE, generator=generator)
    x *= torch.linspace(0.5, 2, SHAPE[-1])
    x[0, 0, 0, :4] *= 20
    return x


def error(x: torch.Tensor, spec: QuantSpec) -> float:
    """The largest error, as a share of the largest magnitude, in percent."""
    fmt, block = spec.number_format, spec.block_for(x.ndim)
    scale, zero = spec.choose(*range_of(x, block), overall=x.abs().max())
    y = fake_quantize(x, scale, zero, block, fmt, narrow_range=spec.narrow_range)
    return 100 * ((y - x).abs().max() / x.abs().max()).item()


def spec_of(name: str, granularity: str) -> QuantSpec:
    fields = {"format": name, "granularity": granularity, **GRANULARITIES[granularity]}
    unsigned = name in FORMATS and isinstance(FORMATS[name], Integer) and not FORMATS[name].signed
    return QuantSpec(**fields, symmetric=not unsigned)


def cell(x: torch.Tensor, name: str, granularity: str) -> str:
    if name in BLOCK_FORMATS:
        if granularity != "group":
            return "blocks ¹"
        return f"{error(x, QuantSpec(format=name)):.2g}"
    if name == "int32":
        return "biases ²"
    try:
        return f"{error(x, spec_of(name, granularity)):.2g}"
    except ConfigError as e:
        return f"{e.what}"


def bits(name: str) -> str:
    if name not in BLOCK_FORMATS:
        return str(FORMATS[name].bits)
    fields = BLOCK_FORMATS[name]
    shared = 8 / fields["group_size"]
    if name in ("mx6", "mx9"):  # the table's bits are the paper's average: 1 of sign, the magnitude, 1/2 + 8/16 shared
        return str(FORMATS[name].bits)
    return f"{FORMATS[fields['format']].bits + shared:g}"


def limits(name: str) -> str:
    fmt = FORMATS[BLOCK_FORMATS[name]["format"] if name in BLOCK_FORMATS else name]
    low, high = fmt.limits(bool(BLOCK_FORMATS.get(name, {}).get("narrow_range")))
    if isinstance(fmt, Floating):
        return f"±{fmt.largest:g}, steps from 2^{fmt.smallest_exponent - fmt.fraction}"
    return f"{low:g} … {high:g}"


def exports(name: str) -> str:
    if name in ("int8", "uint8"):
        return "`onnxruntime`: integer kernels; `onnx`"
    if name == "int32":
        return "`onnxruntime`, of biases"
    element = BLOCK_FORMATS[name]["format"] if name in BLOCK_FORMATS else name
    scale = BLOCK_FORMATS.get(name, {}).get("scale")
    if WIDER.get(element, element) not in TYPES or scale == "bfp":
        return "simulation ³"
    kind, opset = TYPES[WIDER.get(element, element)]
    opset = max(opset, E8M0_OPSET if scale == "e8m0" else 0, BLOCKED_OPSET if name in BLOCK_FORMATS else 0)
    also = "`onnxruntime`, weights, as int8; " if name in ORT.weight_formats else ""
    return f"{also}`onnx`, opset {opset} as {np.dtype(kind).name}"


def page(head: str) -> str:
    x = sample()
    head_row = f"| format | bits | codes | {' | '.join(GRANULARITIES)} | where it exports |"
    rows = [head_row, "|" + "---|" * (len(GRANULARITIES) + 4)]
    for name in (*FORMATS, *(n for n in BLOCK_FORMATS if n not in FORMATS)):
        if name.endswith(("int9", "int10", "int11", "int12", "int13", "int14", "int15")):
            continue
        name_cells = " | ".join(cell(x, name, g) for g in GRANULARITIES)
        rows.append(f"| `{name}` | {bits(name)} | {limits(name)} | {name_cells} | {exports(name)} |")
    return head.rstrip() + "\n\n" + "\n".join(rows) + "\n"
