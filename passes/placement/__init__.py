"""Decide, then do: annotate, insert_quantizers, the saturation guard, quantize_bias, to_qdq."""

from .annotate import annotate
from .correct_bias import correct_bias, mean_products, mean_watchers
from .edges import quantizer_at, quantizer_calls
from .importance import give_importance, importance_watchers
from .insert_quantizers import insert_quantizers
from .open_attention import open_attention
from .open_lstm import open_lstm, round_states
from .quantize_bias import fit_bias, quantize_bias
from .saturation_guard import guard_saturation, maxima_watchers
from .share_scales import shared_magnitudes
from .to_qdq import to_qdq

__all__ = [
    "annotate",
    "correct_bias",
    "fit_bias",
    "give_importance",
    "guard_saturation",
    "importance_watchers",
    "insert_quantizers",
    "maxima_watchers",
    "mean_products",
    "mean_watchers",
    "open_attention",
    "open_lstm",
    "quantize_bias",
    "quantizer_at",
    "quantizer_calls",
    "round_states",
    "shared_magnitudes",
    "to_qdq",
]
