"""The target "acme": ONNX Runtime's kernels, and one row for acme::swiglu."""

from dataclasses import replace

from onnxscript import opset18 as op

from graphq.authoring import Kernel, Pipeline, RewritePass, Target, fork, get_target

from .ops import GATE
from .rules import SplitSwiGLU

ROWS = {"swiglu": [Kernel("MatMulIntegerToFloat", "compute", output="optional", bias="float")]}
SPLIT = Pipeline("acme", [RewritePass(SplitSwiGLU)])


def translate_gate(h):
    a, b = op.Split(h, num_outputs=2, axis=-1)
    return op.Mul(op.Mul(a, op.Sigmoid(a)), b)


def acme(cpu: str = "auto") -> Target:
    """The target; the runtime's own lowering and reference run after swiglu has been taken apart."""
    base = get_target("onnxruntime", cpu=cpu)

    def split_first(then):
        def run(converted):
            gm = fork(converted)
            SPLIT(gm)
            return then(gm)

        run.__name__, run.__doc__ = then.__name__, then.__doc__
        return run

    return replace(
        base,
        name="acme",
        kernels={**base.kernels, **ROWS},
        lowering=split_first(base.lowering),
        reference=split_first(base.reference),
        translations={GATE: translate_gate},
    )
