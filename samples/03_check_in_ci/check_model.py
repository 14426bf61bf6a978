"""Quantize the first sample's model, check it, and compare it with the baseline beside this script."""

from __future__ import annotations

import sys
from pathlib import Path

import qdqtool
from qdqtool.lint import baseline, linting, subject
from qdqtool.lint.findings import Severity

HERE = Path(__file__).parent
SAMPLE = HERE.parent / "01_quantize_a_model"


def main() -> int:
    """Write digits.qdq.onnx to the current folder, print what was found, and return the exit status."""
    result = qdqtool.quantize(SAMPLE / "digits.onnx", SAMPLE / "calibration.npz", target="cpu")
    result.save("digits.qdq.onnx")

    model = subject.load("digits.qdq.onnx")
    target = linting.target_of(model)
    assert target is not None  # it is in the metadata of every model that qdqtool makes
    checked = linting.check(model, target)
    print(f"{checked.conversions} Q/DQ nodes for target {checked.target}, {len(checked.findings)} findings")

    committed = baseline.read(HERE / "baseline.json")
    changes = baseline.compare(baseline.of(model, target), committed, baseline.Tolerances())
    integers = sum(place == "integer" for place in committed.placement.values())
    print(f"{integers} integer kernels and {len(committed.ranges)} ranges in the baseline, {len(changes)} changes")

    for finding in (*checked.findings, *changes):
        print(f"{finding.severity}: {finding.place}: {finding.message}. {finding.remedy}")
    return int(any(finding.severity is Severity.ERROR for finding in (*checked.findings, *changes)))


if __name__ == "__main__":
    sys.exit(main())
