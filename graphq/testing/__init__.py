"""Proof harness: for any rule, random legal graphs that contain its pattern, and the smallest on which it is wrong.

from graphq.testing import prove
prove(MyRule)        # raises Disproved with a runnable counterexample
"""

from graphq.testing.generate import Unfit
from graphq.testing.prove import Disproved, Proof, check, prove
from graphq.testing.recipes import recipe
from graphq.testing.small_graph import SmallGraph

__all__ = ["Disproved", "Proof", "SmallGraph", "Unfit", "check", "prove", "recipe"]
