"""What an author of passes, patterns and targets needs, in one place.

    from graphq.authoring import Rewrite, RewritePass

See docs/write-a-pass.md and docs/write-a-target.md.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from graphq.algorithms import ALGORITHMS, weight_algorithm
from graphq.algorithms.scaling import Pair, scaling_pairs
from graphq.graph.capture import capture
from graphq.graph.equivalence import Equivalence
from graphq.graph.fork import fork
from graphq.graph.invariants import Invariant, checking, none_of
from graphq.graph.match import Match
from graphq.graph.near_miss import RuleReport, report
from graphq.graph.passes import FunctionPass, Pass, PassResult, Pipeline, Rewrite, RewritePass
from graphq.graph.pattern import OP, Pattern
from graphq.graph.plugins import PASSES
from graphq.graph.traced import traced as traced_pattern
from graphq.graph.view import LayerView
from graphq.passes.canonical import canonical_pipeline
from graphq.passes.patterns import QuantPattern
from graphq.passes.targets import TARGETS, Kernel, Target, get_target


def traced(model: nn.Module | Callable[..., Any], *inputs: Tensor) -> Pattern:
    """The pattern of a module or function, in the form that canonical graphs have."""
    return traced_pattern(model, *inputs, canonicalize=canonical_pipeline())


__all__ = [
    "ALGORITHMS", "OP", "PASSES", "TARGETS", "Equivalence", "FunctionPass", "Invariant", "Kernel", "LayerView", "Match",
    "Pair", "Pass", "PassResult", "Pattern", "Pipeline", "QuantPattern", "Rewrite", "RewritePass", "RuleReport",
    "Target",
    "canonical_pipeline", "capture", "checking", "fork", "get_target", "none_of", "report", "scaling_pairs", "traced",
    "weight_algorithm",
]  # fmt: skip
