"""A weight algorithm of one's own: coordinate descent on the error of a layer's products, against GPTQ."""

import torch

import graphq
from graphq.authoring import weight_algorithm


@weight_algorithm("descent")
def descent(weight, hessian, grid, *, sweeps: int = 2):
    """weight [out, in], hessian [in, in]: the inputs' second moments. Every column in turn takes the values that make
    good best what all others have lost."""
    result, nearest = grid.rounded(weight), grid.nearest()
    curvature = hessian.diagonal().clamp(min=1e-9)
    for _ in range(sweeps):
        for column in range(weight.shape[1]):
            lost = weight - result
            others = lost @ hessian[:, column] - lost[:, column] * curvature[column]
            nearest(weight[:, column] + others / curvature[column], column, result[:, column])
    return result


def main() -> None:
    from zoo import minilm, rows, sentences

    model, data, held = minilm(), rows(sentences(32, seed=0)), rows(sentences(16, seed=1), 8)
    int4 = graphq.QuantConfig.load("int4")
    for algorithms in ([], ["descent"], ["gptq"], ["awq", "gptq"]):
        config = graphq.QuantConfig(name="int4", rules=int4.rules, algorithms=algorithms)
        quantized = graphq.quantize(model, config, data, dynamic_shapes="batch+sequence")
        quality = graphq.compare(model, quantized, held, per_op=False)
        print(f"{' then '.join(algorithms) or 'to the nearest':16} {quality.sqnr:.1f} dB")
    print(graphq.explain(quantized)["encoder.layer.0.attention.self.query"][0].reason)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
