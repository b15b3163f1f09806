"""Files that runtimes read."""

from graphq.export.onnx import export_onnx

__all__ = ["export_onnx"]
