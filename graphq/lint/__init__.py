"""Lint of quantized ONNX models, of any tool: what a runtime will not fuse, gets wrong, or does for nothing."""

from graphq.lint import onnxruntime, tensorrt  # noqa: F401  (they register their rules)
from graphq.lint.fix import fix
from graphq.lint.rules import RULES, Finding, lint

__all__ = ["RULES", "Finding", "fix", "lint"]
