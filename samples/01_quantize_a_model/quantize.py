"""Quantize digits.onnx to 8 bits for the CPU, and compare it with the float model on images it has not seen.

Run as `python quantize.py [OUTPUT]`; OUTPUT is digits.qdq.onnx in the current folder if not given.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime

import qdqtool

HERE = Path(__file__).parent


def top1(model: Path) -> float:
    """Return the percentage of evaluation images whose largest logit is at their label, all runtime fusions on."""
    evaluation = np.load(HERE / "evaluation.npz")
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    logits = np.asarray(session.run(["logits"], {"image": evaluation["image"]})[0])
    return 100 * float(np.mean(logits.argmax(axis=1) == evaluation["labels"]))


def main() -> None:
    """Quantize, save, and print what the report says and a line for each model."""
    source = HERE / "digits.onnx"
    output = Path(sys.argv[1] if len(sys.argv) > 1 else "digits.qdq.onnx")

    result = qdqtool.quantize(source, HERE / "calibration.npz", target="cpu", provider="cpu")
    result.save(output)

    report = result.report
    assert report.verification is not None
    for name, db in report.verification.fused.items():
        print(f"{name}: {db:.1f} dB SQNR on {report.verification.samples} calibration images")
    operators = ", ".join(f"{count} {op}" for op, count in report.kernels.items())
    print(f"{report.integer_kernels} integer kernels among {operators}")
    for skip in report.skipped:
        print(f"left alone by {skip.pass_name}: {skip.node} ({skip.reason})")
    for name, path in (("float", source), ("quantized", output)):
        print(f"{name:>9}: top-1 {top1(path):.1f} %, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
