"""Make another tool's w8a8 model of one case, by a Python that has that tool: make_peer.py TOOL ZOO CASE OUTPUT.

Tools: ort (onnxruntime's static quantizer, MinMax) and onnxsim (onnxsim.full_qdq), 100 calibration samples, per-channel
weights.
It prints the seconds taken. Nothing here imports qdqtool.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def make_ort(model: str, feeds: list[Any], output: str) -> None:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # the base has no type hints
        def __init__(self) -> None:
            self.feeds = iter(feeds)

        def get_next(self) -> Any:
            return next(self.feeds, None)

    with tempfile.TemporaryDirectory() as folder:
        prepared = str(Path(folder) / "prepared.onnx")
        quant_pre_process(model, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            output,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )


def make_onnxsim(model: str, feeds: list[Any], output: str) -> None:
    import onnx
    import onnxsim
    from onnxsim import full_qdq

    simplified, _ = onnxsim.simplify(onnx.load(model))
    onnx.save(full_qdq.quantize_full_qdq(simplified, feeds), output)


def main() -> None:
    tool, zoo_folder, name, output = sys.argv[1:5]
    sys.path.insert(0, zoo_folder)
    import zoo

    case = zoo.load(name)
    feeds = zoo.feeds(case, 100)
    {"ort": make_ort, "onnxsim": make_onnxsim}[tool](
        str(case.model), feeds, output
    )  # once, so that imports are not timed
    start = time.perf_counter()
    {"ort": make_ort, "onnxsim": make_onnxsim}[tool](str(case.model), feeds, output)
    print(time.perf_counter() - start)


if __name__ == "__main__":
    main()
