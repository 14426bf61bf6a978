"""The ONNX package's own backend cases, prepared and quantized, and held to what onnxruntime makes of the originals.

The nine whole networks (kind ``real``) lie in the package without their weights, which ConstantOfShape nodes make.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime
from onnx.backend.test.loader import load_model_tests

from qdqtool import chains, foreign, pipeline
from qdqtool.errors import PipelineError, QdqError
from qdqtool.graphs import model as models
from qdqtool.passes_api import PassManager
from qdqtool.recipe import Recipe

KINDS: Final = ("node", "simple", "pytorch-converted", "pytorch-operator", "real")
EVERY: Final = 10
"""Without ``--backend=all``, every how manyth case runs."""
_DATA: Final = Path(onnx.__file__).parent / "backend" / "test" / "data"
REAL: Final = tuple(f"real/{folder.name}" for folder in sorted((_DATA / "real").glob("test_*")))
"""The whole networks, which run one at a time."""
Feeds = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        runs: onnxruntime runs the original.
        equal: the prepared model gives the same outputs.
        quantized: the quantized model loads and gives outputs of the same types and shapes.
        reason: why onnxruntime does not run the original, or why it was refused.
        failure: what went wrong.
    """

    runs: bool
    equal: bool = False
    quantized: bool = False
    reason: str = ""
    failure: str = ""


@functools.cache
def cases() -> dict[str, Any]:
    """Every case by "kind/name", in an order that does not depend on the file system."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package casts values that overflow on purpose
        found = {f"{kind}/{case.name}": case for kind in KINDS for case in load_model_tests(kind=kind)}
    return dict(sorted(found.items()))


def run(case: Any) -> Outcome:
    """Prepare and quantize a case."""
    proto = _model(case)
    feeds = list(_feeds(case, proto))
    try:
        wanted, again = _outputs(proto, feeds), _outputs(proto, feeds)
    except Exception as error:  # the runtime's own exceptions share no base but Exception
        return Outcome(runs=False, reason=_first_line(error))
    # Random results can be held to their types and shapes alone.
    steady = [[_same(x, y, 0, 0) for x, y in zip(*pair, strict=True)] for pair in zip(wanted, again, strict=True)]
    reasons = []
    try:
        equal = quantized = False
        reasons.append(_prepare(case, proto, feeds, wanted, steady))
        equal = not reasons[0]
        reasons.append(_quantize(proto, feeds, wanted))
        quantized = not reasons[1]
    except Exception as error:  # whatever goes wrong is a failure of this case, and the next one is run all the same
        cause = f" ({error.__cause__!r})" if error.__cause__ else ""
        return Outcome(True, equal, quantized, failure=f"{type(error).__name__}: {error}{cause}")
    return Outcome(True, equal, quantized, reason=next(filter(None, reasons), ""))


def _prepare(
    case: Any, proto: onnx.ModelProto, feeds: list[Feeds], wanted: list[list[Any]], steady: list[list[bool]]
) -> str:
    """Hold the prepared model to the original's outputs; why it was refused, or nothing."""
    try:
        state, facts = pipeline.load(proto, Recipe(), "cpu")
        PassManager(chains.preparation()).run(state, facts)
    except QdqError as error:
        return _refusal(error)
    found = _outputs(models.to_proto(state.graph, state.header), feeds)
    for reference, outputs, same in zip(wanted, found, steady, strict=True):
        for index, (expected, got, fixed) in enumerate(zip(reference, outputs, same, strict=True)):
            alike = _same(expected, got, case.rtol, case.atol) if fixed else _alike(expected, got)
            assert alike, f"output {index} of the prepared model differs: {got} instead of {expected}"
    return ""


def _quantize(proto: onnx.ModelProto, feeds: list[Feeds], wanted: list[list[Any]]) -> str:
    """Quantize on the case's own inputs and run the result; why it was refused, or nothing."""
    try:
        result = pipeline.quantize(proto, feeds, target="cpu", provider="cpu", cache=False)
    except QdqError as error:
        return _refusal(error)
    for reference, outputs in zip(wanted, _outputs(result.model, feeds), strict=True):
        for index, (expected, got) in enumerate(zip(reference, outputs, strict=True)):
            assert _alike(expected, got), f"output {index} of the quantized model is {got} instead of {expected}"
    return ""


def _refusal(error: QdqError) -> str:
    """The reason; a pass that fails, or a model made here that does not load, is no refusal."""
    if isinstance(error, PipelineError) or any(words in str(error) for words in ("does not load", "was not written")):
        raise error
    return _first_line(error)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _model(case: Any) -> onnx.ModelProto:
    if case.model is None:
        folder = Path(onnx.__file__).parents[1]
        return onnx.load(folder / case.url if case.model_dir is None else Path(case.model_dir) / "model.onnx")
    proto: onnx.ModelProto = case.model
    return proto


def _feeds(case: Any, proto: onnx.ModelProto) -> Iterator[Feeds]:
    """The inputs of each of the case's data sets by name; an optional input that is left out is not there."""
    filled = {tensor.name for tensor in proto.graph.initializer}
    inputs = [value for value in proto.graph.input if value.name not in filled]
    if case.data_sets is not None:
        for given, _ in case.data_sets:
            yield {value.name: _value(x) for value, x in zip(inputs, given, strict=False)}
    elif case.model_dir is not None:
        for folder in sorted(Path(case.model_dir).glob("test_data_set*")):
            files = [folder / f"input_{index}.pb" for index in range(len(proto.graph.input))]
            yield {v.name: _read(f, v.type) for v, f in zip(proto.graph.input, files, strict=True) if f.exists()}
    else:
        shapes = {v.name: [d.dim_value or 1 for d in v.type.tensor_type.shape.dim] for v in inputs}
        yield {name: np.linspace(0, 1, int(np.prod(s)), dtype=np.float32).reshape(s) for name, s in shapes.items()}


def _value(given: Any) -> Any:
    if isinstance(given, onnx.TensorProto):
        return onnx.numpy_helper.to_array(given)
    return np.asarray(given) if isinstance(given, np.generic) else given


def _read(path: Path, kind: onnx.TypeProto) -> Any:
    content = path.read_bytes()
    if kind.HasField("sequence_type"):
        return onnx.numpy_helper.to_list(onnx.SequenceProto.FromString(content))
    if kind.HasField("optional_type"):
        return onnx.numpy_helper.to_optional(onnx.OptionalProto.FromString(content))
    return onnx.numpy_helper.to_array(onnx.TensorProto.FromString(content))


def _outputs(proto: onnx.ModelProto, feeds: Sequence[Feeds]) -> list[list[Any]]:
    """Outputs of each feed, as onnxruntime makes them on the CPU.

    The package writes the newest IR version, which changes nothing in what its cases hold.
    """
    proto.ir_version = min(proto.ir_version, models.MAX_IR)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    run = foreign.run if foreign.is_needed(session) else type(session).run
    return [run(session, None, feed) for feed in feeds]


def _alike(expected: Any, got: Any) -> bool:
    """Whether two values have the same types and shapes."""
    if isinstance(expected, list):
        return isinstance(got, list) and len(expected) == len(got) and all(map(_alike, expected, got))
    if not isinstance(expected, np.ndarray):
        return type(expected) is type(got)
    return bool(expected.dtype == got.dtype and expected.shape == got.shape)


def _same(expected: Any, got: Any, rtol: float, atol: float) -> bool:
    """Whether two values are equal within the tolerances."""
    if not _alike(expected, got):
        return False
    if isinstance(expected, list):
        return all(_same(x, y, rtol, atol) for x, y in zip(expected, got, strict=True))
    if not isinstance(expected, np.ndarray):
        return bool(expected == got)
    if expected.dtype.kind not in "fc":
        return bool(np.array_equal(expected, got))
    return bool(np.allclose(got, expected, rtol=rtol, atol=atol, equal_nan=True))
