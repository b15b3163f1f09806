"""What the command line prints for machines."""

from __future__ import annotations

import json
import math
from typing import Any


def emit(value: Any) -> None:
    """Print JSON; what is not finite, for which it has no word, as text."""
    print(json.dumps(_finite(value), indent=2, default=str, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
