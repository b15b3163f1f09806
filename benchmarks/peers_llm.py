"""One peer quantizes the linears of one language model; run by vs_llm_peers.py with the python of the peers' own
environment.

    python peers_llm.py METHOD MODEL calibration.pt held.pt     METHOD: llmc-gptq, llmc-awq, modelopt-awq
    python peers_llm.py llmc-layer SIZE ROWS                    one GPTQ layer

Linears become symmetric int4 in groups of 64, the head stays float. Prints seconds, peak memory (bytes) and perplexity.
"""

import json
import math
import os
import resource
import sys
import time

import torch

sys.path.pop(0)  # transformers looks for a package `kernels`, and there is a script of that name beside this one

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


def llm_compressor(model, modifiers, data):
    from datasets import Dataset
    from llmcompressor import oneshot

    rows = [ids[0].tolist() for ids in data]
    calibration = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(r) for r in rows]})
    oneshot(model=model, dataset=calibration, recipe=modifiers, num_calibration_samples=len(rows),
            max_seq_length=len(rows[0]), shuffle_calibration_samples=False)  # fmt: skip
    return model


def scheme():
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    return {"group_0": QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=64)
    )}  # fmt: skip


def llmc_gptq(model, data):
    from llmcompressor.modifiers.gptq import GPTQModifier

    return llm_compressor(model, [GPTQModifier(config_groups=scheme(), ignore=["lm_head"])], data)


def llmc_awq(model, data):
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    quantize = QuantizationModifier(config_groups=scheme(), ignore=["lm_head"])
    return llm_compressor(model, [AWQModifier(), quantize], data)


def modelopt_awq(model, data):
    import copy

    import modelopt.torch.quantization as mtq

    config = copy.deepcopy(mtq.INT4_AWQ_CFG)
    text = json.dumps(config)
    config = json.loads(text.replace('"-1": 128', '"-1": 64'))
    for entry in config["quant_cfg"] if isinstance(config["quant_cfg"], list) else [config["quant_cfg"]]:
        for value in entry.values():
            if isinstance(value, dict) and "block_sizes" in value:
                value["block_sizes"] = {
                    int(k) if k.lstrip("-").isdigit() else k: v for k, v in value["block_sizes"].items()
                }

    def loop(model):
        for ids in data:
            model(ids)

    return mtq.quantize(model, config, loop)


METHODS = {"llmc-gptq": llmc_gptq, "llmc-awq": llmc_awq, "modelopt-awq": modelopt_awq}


def perplexity(model, data):
    total = count = 0
    for ids in data:
        logits = model(input_ids=ids, use_cache=False).logits
        total += torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return math.exp(total / count)


def layer(size, rows):
    """Seconds of one square layer, its Hessian not counted."""
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    torch.manual_seed(0)
    weight, x = torch.randn(size, size), torch.randn(rows, size)
    hessian = 2 / rows * x.T @ x
    args = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=64)
    groups = weight.reshape(size, -1, 64)
    scale = (groups.abs().amax(-1) * 2 / 15)[None]
    start = time.perf_counter()
    quantize_weight(weight[None], hessian[None], scale, torch.zeros_like(scale, dtype=torch.int8), None, args)
    return {"seconds": time.perf_counter() - start}


@torch.no_grad()
def main():
    if sys.argv[1] == "llmc-layer":
        print(json.dumps(layer(*map(int, sys.argv[2:]))))
        return
    from transformers import AutoModelForCausalLM

    method, folder, calibration, held = sys.argv[1:]
    data = torch.load(calibration)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    start = time.perf_counter()
    model = METHODS[method](model, data)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak": peak, "perplexity": perplexity(model, torch.load(held))}))


if __name__ == "__main__":
    main()
