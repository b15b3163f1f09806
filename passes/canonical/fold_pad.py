"""Fold zero padding into the convolution that follows."""

from graphq.graph.match import Match
from graphq.graph.passes import Rewrite


class FoldPadIntoConv(Rewrite):
    """x ── pad(0, same on both sides) ── conv(padding p) ── y  ⇒  x ── conv(padding p + pad) ── y.

    Uneven padding stays: ATen's convolution cannot say it. ONNX's can, and the exporter folds it there.
    """

    @staticmethod
    def pattern(op, x, widths, weight, bias):
        return op.conv(op.pad(x, widths), weight, bias)

    @staticmethod
    def check(m: Match) -> str | None:
        spatial = len(m.weight.shape) - 2
        mode, value = m.pad.arg("mode") or "constant", m.pad.arg("value")
        if mode != "constant" or value not in (None, 0, 0.0):
            return f"padding {mode} with {value}, not with zeros"
        if m.pad.users > 1:
            return "the padded tensor feeds something besides the convolution"
        if len(m.widths) > 2 * spatial or any(not isinstance(p, int) or p < 0 for p in m.widths):
            return "it pads batch or channels, crops, or is computed"
        if any(m.widths[i] != m.widths[i + 1] for i in range(0, len(m.widths), 2)):
            return "it pads one side more than the other"
        return None

    @staticmethod
    def rewrite(m: Match):
        spatial = len(m.weight.shape) - 2
        own = list(m.root.arg("padding"))
        own = own * spatial if len(own) == 1 else own
        extra = [m.widths[i] for i in range(0, len(m.widths), 2)][::-1]
        extra = [0] * (spatial - len(extra)) + extra
        padding = [a + b for a, b in zip(own, extra, strict=True)]
        stride, dilation, groups = (m.root.arg(k) for k in ("stride", "dilation", "groups"))
        return m.call(m.root.node.target, m.x, m.weight, m.bias, stride, padding, dilation, groups)
