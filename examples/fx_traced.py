"""The same results for a module, its torch.fx trace, and its saved .pt2 program."""

import tempfile
from pathlib import Path

import torch

import graphq
from zoo import efficientnet_lite0, photo_crops, rows

model = efficientnet_lite0()
calibration, sample = rows(photo_crops(4, seed=0)), photo_crops(2, seed=1)

with tempfile.TemporaryDirectory() as folder:
    saved = Path(folder) / "model.pt2"
    example = torch.cat(calibration[:2])
    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.export.save(program, saved)
    sources = {
        "nn.Module": model,
        "torch.fx.symbolic_trace": torch.fx.symbolic_trace(model),
        ".pt2": torch.export.load(saved),
    }
    results = {}
    for name, source in sources.items():
        results[name] = graphq.quantize(source, "int8", calibration, progress=False)(sample)
        print(name, "equal" if torch.equal(results[name], results["nn.Module"]) else "DIFFERENT")
assert all(torch.equal(r, results["nn.Module"]) for r in results.values())
