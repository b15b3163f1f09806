"""Weight algorithms in the configs of other systems, in our words.

What they say of the order of layers is left out, since the graph knows it. Quark's `inside_layer_modules` too: here
GPTQ chooses every weight that a rule quantizes. What else would change the result and has no counterpart is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphq.config.config import Algorithm
from graphq.config.imports import plain, take
from graphq.errors import ConfigError, did_you_mean

QUARK = {
    "awq": ("scaling_layers", "model_decoder_layers"),
    "smooth": ("alpha", "scale_clamp_min", "scaling_layers", "model_decoder_layers"),
    "autosmoothquant": ("scaling_layers", "model_decoder_layers"),
    "gptq": ("block_size", "damp_percent", "desc_act", "static_groups", "true_sequential", "inside_layer_modules",
             "model_decoder_layers"),
}  # fmt: skip
QUARK_CLAMP = 1e-3  # its default, far below any scale that a search chooses
OUR_NAMES = {"smooth": "smoothquant", "autosmoothquant": "smoothquant"}
MODELOPT = {
    "smoothquant": ("alpha",), "awq_lite": ("alpha_step",), "gptq": ("percdamp", "block_size"),
}  # fmt: skip


def quark_algorithms(value: Any) -> tuple[Algorithm, ...]:
    """algo_config: one config, or several, as dicts with a name or as Quark's own."""
    every = value if isinstance(value, (list, tuple)) else [value]
    return tuple(_of_quark({"name": v} if isinstance(v, str) else dict(plain(v))) for v in every)


def _of_quark(fields: dict[str, Any]) -> Algorithm:
    name = fields.pop("name", None)
    if name not in QUARK:
        raise ConfigError(f"Quark's algorithm {name!r} has no counterpart", where="algo_config",
                          remedy=did_you_mean(str(name), QUARK))  # fmt: skip
    f = take(fields, f"Quark's {name}", QUARK[name])
    if f.get("true_sequential") is False:
        raise ConfigError("layers see the inputs that rounded layers before them give", where="true_sequential",
                          remedy="Leave it out; propagate_error: false is for float inputs.")  # fmt: skip
    if name == "gptq":
        order = "activation" if f.get("desc_act", True) else "none"
        groups = "static" if f.get("static_groups", True) else "dynamic"
        if (order, groups) == ("activation", "dynamic"):
            raise ConfigError("groups of columns that do not lie together have no place in a file here",
                              where="static_groups", remedy="static_groups: true, or desc_act: false.")  # fmt: skip
        return Algorithm(name="gptq", args={"damping": f.get("damp_percent", 0.01), "order": order, "groups": groups})
    if f.get("scale_clamp_min", QUARK_CLAMP) != QUARK_CLAMP:
        raise ConfigError(
            "scales have a lower bound of their own here", where="scale_clamp_min", remedy="Leave it out."
        )
    args: dict[str, Any] = {"alpha": f.get("alpha", 1.0)} if name == "smooth" else {}
    args |= {"grid": 20, "duo": False} if name == "awq" else {}
    if f.get("scaling_layers"):
        args |= {k: f[k] for k in ("scaling_layers", "model_decoder_layers") if k in f}
    return Algorithm(name=OUR_NAMES.get(name, name), args=args)


def modelopt_algorithms(value: Any) -> tuple[Algorithm, ...]:
    """algorithm: a name, or a dict with a method, or several; "max" stands for calibration alone."""
    every = value if isinstance(value, (list, tuple)) else [value]
    found = (_of_modelopt(dict(v) if isinstance(v, Mapping) else {"method": v}) for v in every)
    return tuple(a for a in found if a is not None)


def _of_modelopt(fields: dict[str, Any]) -> Algorithm | None:
    method = fields.pop("method", None)
    if method in ("max", None):
        take(fields, "ModelOpt's max", ("distributed_sync",))
        return None
    if method not in MODELOPT:
        clip = " awq_lite, with the observer imatrix_mse for weights, clips them." if "awq" in str(method) else ""
        raise ConfigError(f"ModelOpt's algorithm {method!r} has no counterpart", where="algorithm",
                          remedy=did_you_mean(str(method), MODELOPT) + clip)  # fmt: skip
    f = take(fields, f"ModelOpt's {method}", MODELOPT[method])
    if method == "smoothquant":
        return Algorithm(name="smoothquant", args={"alpha": f.get("alpha", 1.0)})
    if method == "awq_lite":
        step = f.get("alpha_step", 0.1)
        if not 0 < step <= 1:
            raise ConfigError(f"a step of {step} gives no grid from 0 to 1", where="alpha_step", remedy="Say 0.1.")
        return Algorithm(name="awq", args={"grid": round(1 / step), "duo": False})
    return Algorithm(name="gptq", args={"damping": f.get("percdamp", 0.01)})
