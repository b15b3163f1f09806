"""QDQ models written node by node, as other tools would write them."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

RNG = np.random.default_rng(0)


class Build:
    """A QDQ model, node by node."""

    def __init__(self, shape):
        self.shape, self.nodes, self.constants, self.last = shape, [], [], "x"

    def constant(self, name, value, dtype):
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def node(self, kind, inputs, output, **attributes):
        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"n_{output}", **attributes))
        self.last = output
        return output

    def qdq(self, x, name, scale=0.02, zero=128, dtype=np.uint8, *, with_zero=True, **attributes):
        tail = [self.constant(f"{name}_s", scale, np.float32)]
        if with_zero:
            zeros = np.full(np.shape(scale), zero)
            tail.append(self.constant(f"{name}_z", zeros, dtype))
        codes = self.node("QuantizeLinear", [x, *tail], f"{name}_q", **attributes)
        return self.node("DequantizeLinear", [codes, *tail], name, **attributes)

    def weight(self, name, shape, axis=None, dtype=np.int8, scale=0.01, largest=60):
        low = 0 if dtype == np.uint8 else -largest
        codes = self.constant(f"{name}_q", RNG.integers(low, largest, shape), dtype)
        scale = scale * RNG.uniform(0.5, 1.5, shape[axis]) if axis is not None else scale
        zero = np.zeros(np.shape(scale))
        tail = [self.constant(f"{name}_s", scale, np.float32), self.constant(f"{name}_z", zero, dtype)]
        self.node("DequantizeLinear", [codes, *tail], name, **({} if axis is None else {"axis": axis}))
        return name

    def model(self, outputs=None):
        outputs = outputs or [self.last]
        graph = helper.make_graph(
            self.nodes, "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)],
            [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs],
            self.constants,
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
        model = onnx.shape_inference.infer_shapes(model)
        onnx.checker.check_model(model)
        return model
