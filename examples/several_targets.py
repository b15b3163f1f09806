"""One calibration, files for three runtimes, each checked as far as this machine can."""

import tempfile
from pathlib import Path

import onnx

import graphq
from graphq.lint import lint
from zoo import efficientnet_lite0, photo_crops, rows

TARGETS = ["onnxruntime", "openvino", "tensorrt"]  # "torch_compile" too, where a minute of compilation does not matter
model, calibration, held_out = efficientnet_lite0(), rows(photo_crops(16, seed=0)), rows(photo_crops(4, seed=1), 4)
graphs = graphq.quantize(model, "int8", calibration, target=TARGETS)

with tempfile.TemporaryDirectory() as folder:
    files = graphq.export(graphs, Path(folder) / "model.onnx")
    for name, path in files.items():
        explanation = graphq.explain(graphs[name], path)  # where the runtime is here: the kernels that really run
        quality = graphq.compare(model, graphs[name], held_out, per_op=False)
        print(f"\n{path.name}: {quality.sqnr:.1f} dB, {explanation.kernels()}")
        print(f"{len(explanation.disagreements)} kernels are others than predicted")
        print(graphq.verify(graphs[name], path, held_out))
    for target in ("onnxruntime", "tensorrt"):
        print(target, "lint finds", lint(onnx.load(files[target]), target) or "nothing")
