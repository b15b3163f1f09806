"""One form for inference batch norm, which tracing writes differently for models that work in place."""

import torch

from graphq.graph.match import Match
from graphq.graph.passes import Rewrite


class FunctionalBatchNorm(Rewrite):
    """getitem(_native_batch_norm_legit_no_training(x, …), 0)  ⇒  batch_norm(x, …)."""

    @staticmethod
    def pattern(op, x, gamma, beta, mean, var, momentum, eps):
        return op.getitem(op.native_batch_norm(x, gamma, beta, mean, var, momentum, eps), 0)

    @staticmethod
    def rewrite(m: Match):
        params = (m.gamma, m.beta, m.mean, m.var)
        node = m.call(torch.ops.aten.batch_norm.default, m.x, *params, False, m.momentum, m.eps, False)
        node.meta["nn_module_stack"] = m.native_batch_norm.node.meta.get("nn_module_stack", {})
        return node
