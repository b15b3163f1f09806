"""What `import graphq` costs: the exporter and its libraries are loaded by those who export."""

import subprocess
import sys


def test_quantizing_does_not_load_the_exporter_and_exporting_does(tmp_path):
    script = """
import sys, torch, graphq
graph = graphq.quantize(torch.nn.Linear(8, 8), "int8", [torch.randn(4, 8)], progress=False)
assert not {"onnxscript", "graphq.export.onnx"} & set(sys.modules)
for _ in range(2):
    graphq.export(graph, sys.argv[1])
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "m.onnx")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
