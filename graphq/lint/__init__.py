"""Lint of quantized ONNX models, of any tool: what a runtime will not fuse, gets wrong, or does for nothing."""

from graphq.lint import tensorrt  # noqa: F401  (registers its rules)
from graphq.lint.fix import fix
from graphq.lint.rules import RULES, Finding, lint

__all__ = ["RULES", "Finding", "fix", "lint"]
