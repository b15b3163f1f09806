"""graphq: a graph-mode quantizer for PyTorch that explains every decision and proves what the runtime computes.

prepared = graphq.prepare(model, "int8", args=(x,))     # capture, decide, place quantizers
graphq.calibrate(prepared, batches)                     # find the ranges
quantized = graphq.convert(prepared)                    # integer codes
graphq.export(quantized, "model.onnx")                  # ONNX QDQ
graphq.verify(quantized, "model.onnx", batches)         # is what was simulated what runs?
"""

import graphq.export  # noqa: F401  (first: loaded later it would take the place of the function of that name)
from graphq.algorithms.codes import quantized_weights
from graphq.algorithms.results import weight_results
from graphq.algorithms.store import apply_stored, stored_weights
from graphq.api import calibrate, capture, capture_like, convert, export, prepare, quantize
from graphq.config import QuantConfig, QuantSpec, Rule, Scheme
from graphq.config import presets as presets
from graphq.eager import apply_weights
from graphq.errors import GraphqError
from graphq.evaluate.algorithms import compare_algorithms
from graphq.evaluate.compare import compare
from graphq.evaluate.verify import verify
from graphq.graph.checkpoint import from_disk
from graphq.nn import register, unregister
from graphq.passes.targets import get_target
from graphq.qat import fold_weights, qat
from graphq.report.explain import explain
from graphq.report.html import report
from graphq.storage import load, save

__version__ = "0.1.0"

__all__ = [
    "GraphqError",
    "QuantConfig",
    "QuantSpec",
    "Rule",
    "Scheme",
    "apply_stored",
    "apply_weights",
    "calibrate",
    "capture",
    "capture_like",
    "compare",
    "compare_algorithms",
    "convert",
    "explain",
    "export",
    "fold_weights",
    "from_disk",
    "get_target",
    "load",
    "prepare",
    "presets",
    "qat",
    "quantize",
    "quantized_weights",
    "register",
    "report",
    "save",
    "stored_weights",
    "unregister",
    "verify",
    "weight_results",
]
