"""graphq: a graph-mode quantizer for PyTorch."""
