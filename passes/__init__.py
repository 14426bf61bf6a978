"""The catalogue of graph passes: one frozen dataclass a file, listed here in order."""

from __future__ import annotations

from qdqtool.passes.add_bias import AddBias
from qdqtool.passes.choose_ranges import ChooseRanges
from qdqtool.passes.convert_float16 import ConvertFloat16
from qdqtool.passes.correct_bias import CorrectBias
from qdqtool.passes.correct_bias_analytic import CorrectBiasAnalytic
from qdqtool.passes.correct_weights import CorrectWeights
from qdqtool.passes.equalize_layers import EqualizeLayers
from qdqtool.passes.expand_swish import ExpandSwish
from qdqtool.passes.fold_batchnorm import FoldBatchnorm
from qdqtool.passes.fold_constants import FoldConstants
from qdqtool.passes.fold_input_scale import FoldInputScale
from qdqtool.passes.fold_pad import FoldPad
from qdqtool.passes.fold_scale_shift import FoldScaleShift
from qdqtool.passes.fuse_gelu import FuseGelu
from qdqtool.passes.fuse_hard_swish import FuseHardSwish
from qdqtool.passes.fuse_linear_bias import FuseLinearBias
from qdqtool.passes.fuse_normalization import FuseNormalization
from qdqtool.passes.gemm_to_matmul import GemmToMatmul
from qdqtool.passes.infer_shapes import InferShapes
from qdqtool.passes.inline_branches import InlineBranches
from qdqtool.passes.insert_qdq import InsertQdq
from qdqtool.passes.leave_unrun import LeaveUnrun
from qdqtool.passes.lift_constants import LiftConstants
from qdqtool.passes.merge_moves import MergeMoves
from qdqtool.passes.observe import Observe
from qdqtool.passes.plan import PlanQuantization
from qdqtool.passes.plan_float16 import PlanFloat16
from qdqtool.passes.plan_smoothing import PlanSmoothing
from qdqtool.passes.plan_weights import PlanWeights
from qdqtool.passes.pointwise_to_gemm import PointwiseToGemm
from qdqtool.passes.raise_opset import RaiseOpset
from qdqtool.passes.remove_identity import RemoveIdentity
from qdqtool.passes.round_weights import RoundWeights
from qdqtool.passes.scalar_operands import ScalarOperands
from qdqtool.passes.scale_weights import ScaleWeights
from qdqtool.passes.smooth_activations import SmoothActivations
from qdqtool.passes.use_statistics import UseStatistics
from qdqtool.passes.verify import Verify
from qdqtool.passes.widen_float16 import WidenFloat16

BUILTIN = (
    LiftConstants,
    RaiseOpset,
    InferShapes,
    ScalarOperands,
    FoldConstants,
    InlineBranches,
    WidenFloat16,
    RemoveIdentity,
    MergeMoves,
    ExpandSwish,
    FuseGelu,
    FuseNormalization,
    FuseLinearBias,
    FoldBatchnorm,
    FuseHardSwish,
    FoldScaleShift,
    FoldInputScale,
    FoldPad,
    PointwiseToGemm,
    AddBias,
    EqualizeLayers,
    GemmToMatmul,
    PlanQuantization,
    PlanSmoothing,
    PlanWeights,
    PlanFloat16,
    Observe,
    UseStatistics,
    LeaveUnrun,
    SmoothActivations,
    ChooseRanges,
    ScaleWeights,
    ConvertFloat16,
    RoundWeights,
    CorrectWeights,
    CorrectBias,
    CorrectBiasAnalytic,
    InsertQdq,
    Verify,
)
