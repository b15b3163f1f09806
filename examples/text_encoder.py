"""A text encoder with dynamic batch and sequence, and a config of one's own: one layer's output stays float."""

import tempfile
from pathlib import Path

import graphq
from graphq import QuantConfig, Rule
from zoo import minilm, rows, sentences

config = QuantConfig(
    name="encoder",
    rules=(
        Rule(select="*", scheme="int8"),
        Rule(select="attention", reason="scores stay float"),
        Rule(select="re:encoder\\.layer\\.0\\..*", reason="the first layer is the most sensitive"),
    ),
    ignore=("pooler",),
)
model, calibration = minilm(), rows(sentences(16, seed=0))
quantized = graphq.quantize(model, config, calibration, dynamic_shapes="batch+sequence")

explanation = graphq.explain(quantized)
for layer in ("encoder.layer.0.attention.self.query", "encoder.layer.1.attention.self.query", "pooler.dense"):
    row = explanation[layer][0]
    print(f"{layer}: {row.action} — {row.reason} ({row.rule})")

with tempfile.TemporaryDirectory() as folder:
    path = graphq.export(quantized, Path(folder) / "minilm-int8.onnx")
    held_out = rows(sentences(8, seed=1), 8)
    print(graphq.verify(quantized, path, held_out))
print(config.to_yaml())
