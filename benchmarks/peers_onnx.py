"""One peer quantizes one ONNX file; run by vs_peers.py with the python of the peers' own environment.

    python peers_onnx.py METHOD float.onnx calibration.npz out.onnx

calibration.npz: an array per input of the model, samples along the first axis. Prints the seconds it took.
"""

import sys
import time

import numpy as np
import onnx


def feeds(data: dict) -> list[dict]:
    count = len(next(iter(data.values())))
    return [{k: v[i : i + 1] for k, v in data.items()} for i in range(count)]


def ort_static(source: str, data: dict, out: str, weight: str) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        left = iter(feeds(data))

        def get_next(self):
            return next(self.left, None)

    quantize_static(
        source, out, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, activation_type=QuantType.QUInt8,
        weight_type=getattr(QuantType, weight),
    )  # fmt: skip


def ort_dynamic(source: str, data: dict, out: str) -> None:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(source, out, per_channel=True)


def ort_nbits(source: str, data: dict, out: str) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(source), bits=4, block_size=32, is_symmetric=False, accuracy_level=4)
    quantizer.process()
    quantizer.model.save_model_to_file(out)


def nncf_static(source: str, data: dict, out: str) -> None:
    import nncf

    transformer = "input_ids" in data
    quantized = nncf.quantize(
        onnx.load(source), nncf.Dataset(feeds(data)), subset_size=len(feeds(data)),
        model_type=nncf.ModelType.TRANSFORMER if transformer else None,
    )  # fmt: skip
    onnx.save(quantized, out)


def modelopt_static(source: str, data: dict, out: str) -> None:
    from modelopt.onnx.quantization import quantize

    quantize(
        source, quantize_mode="int8", calibration_data=data, calibration_method="max", output_path=out,
        high_precision_dtype="fp32", calibration_eps=["cpu"],
    )  # fmt: skip


METHODS = {
    "ORT static u8s8": lambda s, d, o: ort_static(s, d, o, "QInt8"),
    "ORT static u8u8": lambda s, d, o: ort_static(s, d, o, "QUInt8"),
    "ORT dynamic": ort_dynamic,
    "ORT MatMulNBits": ort_nbits,
    "NNCF": nncf_static,
    "ModelOpt": modelopt_static,
}

if __name__ == "__main__":
    method, source, calibration, out = sys.argv[1:]
    given = dict(np.load(calibration))
    start = time.perf_counter()
    METHODS[method](source, given, out)
    print(time.perf_counter() - start)
