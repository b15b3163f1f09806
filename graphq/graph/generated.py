"""The Python code of a graph, generated when it is needed: passes come one after another, a call at the end.

torch.fx generates it on `recompile`, which costs more than most rewrites of a large graph.
"""

from __future__ import annotations

from typing import Any

from torch import fx


def generate_when_called(gm: fx.GraphModule) -> None:
    """The graph has changed: its code is generated again when it is next called."""
    type(gm).forward = _generate_first  # every GraphModule has a class of its own


def generate(gm: fx.GraphModule) -> None:
    """Generate the code of a changed graph now, for those who read the signature of its `forward`."""
    if type(gm).forward is _generate_first:
        gm.recompile()


def _generate_first(self: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
    self.recompile()
    return self.forward(*args, **kwargs)
