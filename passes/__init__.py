"""The catalogue of graph passes: one frozen dataclass a file, listed here in order."""

from __future__ import annotations

from qdqtool.passes.add_bias import AddBias
from qdqtool.passes.choose_ranges import ChooseRanges
from qdqtool.passes.correct_bias import CorrectBias
from qdqtool.passes.fold_batchnorm import FoldBatchnorm
from qdqtool.passes.fold_constants import FoldConstants
from qdqtool.passes.fold_scale_shift import FoldScaleShift
from qdqtool.passes.fuse_linear_bias import FuseLinearBias
from qdqtool.passes.infer_shapes import InferShapes
from qdqtool.passes.insert_qdq import InsertQdq
from qdqtool.passes.lift_constants import LiftConstants
from qdqtool.passes.observe import Observe
from qdqtool.passes.plan import PlanQuantization
from qdqtool.passes.pointwise_to_gemm import PointwiseToGemm
from qdqtool.passes.raise_opset import RaiseOpset
from qdqtool.passes.remove_identity import RemoveIdentity
from qdqtool.passes.use_statistics import UseStatistics
from qdqtool.passes.verify import Verify

BUILTIN = (
    LiftConstants,
    RaiseOpset,
    InferShapes,
    FoldConstants,
    RemoveIdentity,
    FoldBatchnorm,
    FoldScaleShift,
    FuseLinearBias,
    PointwiseToGemm,
    AddBias,
    PlanQuantization,
    Observe,
    UseStatistics,
    ChooseRanges,
    CorrectBias,
    InsertQdq,
    Verify,
)
