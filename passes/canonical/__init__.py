"""One form for every op: the passes that run on each captured graph before anything is decided."""

from graphq.graph.invariants import none_of
from graphq.graph.passes import FunctionPass, Pipeline, Rewrite, RewritePass
from graphq.graph.plugins import plugins_of

from .drop_full_mask import drop_full_masks
from .drop_noops import (
    DropCast,
    DropDropout,
    DropExpand,
    DropIdentity,
    DropReshape,
    DropSlice,
    ViewToReshape,
    drop_asserts,
)
from .fold_batchnorm import (
    FoldBatchNormAfterCat,
    FoldBatchNormAfterSplit,
    FoldBatchNormIntoConv,
    FoldBatchNormIntoConvTranspose,
    FoldBatchNormIntoLinear,
    FoldBatchNormIntoNextConv,
)
from .fold_pad import FoldPadIntoConv
from .normalize_batchnorm import FunctionalBatchNorm
from .normalize_clip import Clamp, ClampMin, ClipFromZero, Relu6
from .normalize_conv import ConvSame
from .normalize_experts import normalize_experts
from .normalize_linear import AddBias, Addmm, MatmulParameter
from .normalize_mean import GlobalMean
from .recognize_gelu import ErfGelu, TanhGelu
from .recognize_norm import LayerNormBySqrt, RmsNorm
from .recognize_silu import Silu
from .recognize_softmax import SoftmaxByExp


def canonical_pipeline() -> Pipeline:
    """The canonical passes, in order; those of other packages come last."""
    plugins = plugins_of(Rewrite)
    return Pipeline(
        "canonical",
        [
            FunctionPass(drop_asserts),
            FunctionPass(drop_full_masks),
            FunctionPass(normalize_experts),
            RewritePass(ViewToReshape, name="view_to_reshape"),
            RewritePass(DropDropout, DropIdentity, DropCast, DropReshape, DropExpand, DropSlice, name="drop_noops"),
            RewritePass(FunctionalBatchNorm, name="normalize_batchnorm", ensures=(none_of("native_batch_norm"),)),
            RewritePass(Relu6, Clamp, ClampMin, ClipFromZero, name="normalize_clip", fixpoint=True),
            RewritePass(ConvSame, name="normalize_conv"),
            RewritePass(Addmm, MatmulParameter, AddBias, name="normalize_linear", fixpoint=True),
            RewritePass(ErfGelu, TanhGelu, Silu, name="recognize_activations"),
            RewritePass(LayerNormBySqrt, RmsNorm, SoftmaxByExp, name="recognize_norms"),
            RewritePass(GlobalMean, name="normalize_mean"),
            RewritePass(FoldPadIntoConv, name="fold_pad"),
            RewritePass(
                FoldBatchNormIntoConv,
                FoldBatchNormIntoConvTranspose,
                FoldBatchNormIntoLinear,
                FoldBatchNormAfterCat,
                FoldBatchNormAfterSplit,
                FoldBatchNormIntoNextConv,
                name="fold_batchnorm",
                fixpoint=True,
            ),
            *([RewritePass(*plugins, name="plugins")] if plugins else []),
        ],
    )


__all__ = ["canonical_pipeline"]
