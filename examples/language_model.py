"""A language model in int4, layer by layer: weights stay on disk, chosen ones go to a folder, a killed run goes on.

    python language_model.py CHECKPOINT TEXT [--windows 64] [--store chosen/] [--onnx model.onnx]

CHECKPOINT: a folder of transformers with safetensors and a tokenizer; TEXT: a file of prose, of which the first windows
of 256 tokens are for perplexity and the next ones for calibration.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import graphq
from graphq.evaluate.tasks import perplexity

WINDOW, HELD = 256, 16
FREE = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}


class Logits(torch.nn.Module):  # tokens [n, length] → logits [n, length, vocabulary]
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkpoint", type=Path)
parser.add_argument("text", type=Path)
parser.add_argument("--windows", type=int, default=64, help="for calibration")
parser.add_argument("--store", type=Path, default=Path("chosen"))
parser.add_argument("--onnx", type=Path, default=Path("model.onnx"))
options = parser.parse_args()
tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
ids = tokenizer(options.text.read_text(), return_tensors="pt").input_ids[0]
held, data = ids[: HELD * WINDOW], ids[HELD * WINDOW :].split(WINDOW)[: options.windows]
batches = [window[None] for window in data if len(window) == WINDOW]

shape = AutoConfig.from_pretrained(options.checkpoint, attn_implementation="sdpa")
on_disk = graphq.from_disk(lambda: AutoModelForCausalLM.from_config(shape, dtype=torch.float32), options.checkpoint)
prepared = graphq.prepare(Logits(on_disk), "int4_gptq", (torch.cat(batches[:2]),), dynamic_shapes=(FREE,))
calibrated = graphq.calibrate(prepared, batches, store=options.store)
for result in sorted(graphq.weight_results(calibrated), key=lambda r: -(r.relative_output_squared_error or 0))[:5]:
    print(result.layer, result.words())

print(f"perplexity, int4:  {perplexity(graphq.fold_weights(calibrated), held):.2f}")
quantized = graphq.convert(calibrated)
graphq.export(quantized, options.onnx)
print(graphq.verify(quantized, options.onnx, batches[:1]))

model = Logits(AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype=torch.float32))
print(f"perplexity, float: {perplexity(model, held):.2f}")
graphq.apply_stored(options.store, model, packed=True)  # codes under its linears: all of transformers works, in less
start = tokenizer("The capital of France is", return_tensors="pt").input_ids
print(tokenizer.decode(model.model.generate(start, max_new_tokens=20, do_sample=False)[0]))
