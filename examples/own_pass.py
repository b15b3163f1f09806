"""A rule of one's own: found in a real architecture, proven, and part of the quantization.

ConvNeXt multiplies the output of the last linear of every block by a learned scale. The product goes into the weights.
"""

import torch
from rich.console import Console
from transformers import ConvNextConfig, ConvNextForImageClassification

import graphq
from graphq.authoring import Rewrite, RewritePass, canonical_pipeline, capture, fork, report
from graphq.testing import prove

aten = torch.ops.aten
console = Console()


class FoldScaleIntoLinear(Rewrite):
    """linear(x, w, b) · s  ⇒  linear(x, s·w, s·b), s one value per output."""

    @staticmethod
    def pattern(op, x, weight, bias, scale):
        linear = op.linear(x, op.param(weight), op.param(bias))
        return op.once(linear) * op.param(scale)

    @staticmethod
    def check(m):
        matrix = len(m.x.shape) >= 2 and m.scale.shape == (m.weight.shape[0],)
        return None if matrix else "the scale is not one value per output"

    @staticmethod
    def rewrite(m):
        s = m.tensor("scale")
        bias = None if m.bias is None else m.param("scaled_bias", m.tensor("bias") * s)
        return m.call(aten.linear.default, m.x, m.param("scaled", m.tensor("weight") * s[:, None]), bias, like=m.linear)


torch.manual_seed(0)
config = ConvNextConfig(hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 2, 1], num_labels=10, layer_scale_init_value=0.5)
model, images = ConvNextForImageClassification(config).eval(), torch.randn(2, 3, 64, 64)

gm = fork(capture(model, (images,)))
canonical_pipeline()(gm)
for m in report(gm, FoldScaleIntoLinear).matches:
    console.print(f"fits at {m.root.path}")
proof = prove(FoldScaleIntoLinear)
console.print(f"proven on {proof.rewritten} of {proof.graphs} generated graphs; declined: {dict(proof.declined)}")

pipeline = canonical_pipeline().after("normalize_linear", RewritePass(FoldScaleIntoLinear, name="fold_scale"))
for name, canonical in (("without", None), ("with", pipeline)):
    graph = graphq.prepare(model, "int8", (images,), canonical=canonical)
    graphq.calibrate(graph, [images], progress=False)
    muls = sum(r.op == "mul.Tensor" for r in graphq.explain(graph).rows)
    quality = graphq.compare(model, graph, [images], per_op=False)
    console.print(f"{name} the rule: {muls} products, {quality.sqnr:.1f} dB")
