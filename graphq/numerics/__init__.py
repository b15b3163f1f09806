"""Tensors in, tensors out: number formats and the arithmetic of quantization. Knows nothing of graphs."""
