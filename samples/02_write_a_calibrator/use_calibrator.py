"""Quantize the digit classifier with the calibrator of this folder, on data of which one sample in fifty is broken.

Install the calibrator first (`pip install .` in this folder), then run `python use_calibrator.py`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

import qdqtool

DIGITS = Path(__file__).parents[1] / "01_quantize_a_model"


def calibration_with_broken_frames() -> dict[str, npt.NDArray[np.float32]]:
    """Return the calibration images, every fiftieth as bright as no picture is."""
    images = np.load(DIGITS / "calibration.npz")["image"].copy()
    images[::50] *= 20
    return {"image": images}


def main() -> None:
    """Quantize once by each calibrator; print the SQNR on clean images that were not calibrated on."""
    model, data = DIGITS / "digits.onnx", calibration_with_broken_frames()
    for choice in ("minmax", "mse", "sample_quantile"):
        result = qdqtool.quantize(model, data, target="cpu", provider="cpu", calibrator=choice)
        found = qdqtool.compare(model, result.model, DIGITS / "evaluation.npz", tensors=False)
        print(f"{choice}: {found.worst_db:.1f} dB SQNR")


if __name__ == "__main__":
    main()
