"""Scores of models with 4-bit weights and activations on real models, method by method, as a Markdown table.

    python -m benchmarks.low_bits [--precision w4a4 ...] [--method NAME ...] [--target cpu] [--zoo DIR] [case ...]

The first and the last layer have 8 bits everywhere. *Naive* is min-max, nearest rounding, a scale for each output
channel of a weight and one for each activation; rows behind it add one method each to naive with a scale for each
channel of an activation, then the three methods of Banner et al. (NeurIPS 2019) together, and last the defaults, with
and without bits allocated to the channels of activations. The change is against float, paired over the evaluation
samples, with its 95 % confidence interval; what is won back is the share of naive's loss.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import qdqtool
from benchmarks.accuracy_8bit import sqnr
from benchmarks.zoo import DEFAULT, load_zoo

PRECISIONS = ("w8a4", "w4a8", "w4a4")
CASES = (
    "resnet20_cifar10",
    "resnet56_cifar10",
    "mobilenetv2_small_cifar10",
    "mobilenetv1_vww",
    "tiny_darknet_imagenet",
)
NAIVE = "naive"
_PLAIN: dict[str, Any] = {"calibrator": "minmax", "weight_rounding": "nearest", "bias_correction": False}
_CHANNELS = {"activation_per_channel": True}
_ALLOCATED = {"bits_per_channel": "both"}
_AS_PUBLISHED = {"bits_per_channel": "both", "bit_allocation": "published"}
_THREE: dict[str, Any] = {**_PLAIN, **_CHANNELS, "calibrator": "aciq", "bias_correction": True}
METHODS: dict[str, dict[str, Any]] = {
    NAIVE: _PLAIN,
    "naive, activations per channel": {**_PLAIN, **_CHANNELS},
    "+ ACIQ": {**_PLAIN, **_CHANNELS, "calibrator": "aciq"},
    "+ bit allocation": {**_PLAIN, **_CHANNELS, **_ALLOCATED},
    "+ bias correction": {**_PLAIN, **_CHANNELS, "bias_correction": True},
    "the three": {**_THREE, **_ALLOCATED},
    "the three, allocation as published": {**_THREE, **_AS_PUBLISHED},
    "all: the defaults": {},
    "all, bits allocated to channels of activations": {"bits_per_channel": "activations"},
}


@dataclass(frozen=True)
class Row:
    """One quantized model: score in percent, change with half its confidence interval, SQNR in dB, size, seconds."""

    method: str
    score: float
    change: float
    margin: float
    sqnr_db: float
    size: float
    kernels: int
    seconds: float


def measure(zoo: Any, case: Any, before: Any, method: str, fields: dict[str, Any]) -> Row:
    wanted = {**fields, **METHODS[method]}
    if wanted.get("bits_per_channel") == "activations" and fields["precision"].endswith("a8"):
        del wanted["bits_per_channel"]  # there are as many bits as a channel may have
    start = time.perf_counter()
    result = qdqtool.quantize(str(case.model), zoo.feeds(case, 100), **wanted, provider="cpu", cache=False)
    seconds = time.perf_counter() - start
    after = zoo.run(result.model.SerializeToString(), case)
    difference = 100.0 * (case.correct(after).astype(float) - case.correct(before).astype(float))
    margin = 1.96 * float(difference.std(ddof=1)) / np.sqrt(difference.size)
    sizes = result.report.sizes
    return Row(method, case.score(after), float(difference.mean()), margin, sqnr(before[0], after[0]),
               sizes.quantized_bytes / sizes.float_bytes, result.report.integer_kernels, seconds)  # fmt: skip


def show(precision: str, row: Row, naive_change: float) -> str:
    won = "" if row.method == NAIVE or naive_change >= 0 else f"{100 * (1 - row.change / naive_change):.0f} %"
    change = f"{row.change:+.2f} ± {row.margin:.2f}"
    figures = f"{row.score:.2f} | {change} | {won} | {row.sqnr_db:.2f} | {row.size:.2f} | {row.kernels}"
    return f"| {precision} | {row.method} | {figures} | {row.seconds:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", default=DEFAULT, type=Path)
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--storage", default="packed")
    parser.add_argument("--precision", action="append", choices=[*PRECISIONS, "w2a8"])
    parser.add_argument("--method", action="append", choices=METHODS)
    parser.add_argument("cases", nargs="*")
    options = parser.parse_args()
    zoo = load_zoo(options.zoo)
    for name in options.cases or CASES:
        case = zoo.load(name)
        before = zoo.run(case.model, case)
        print(f"\n{name}, float {case.score(before):.2f}\n")
        print("| precision | method | score | change | won back | SQNR dB | size | integer kernels | s |")
        print("|---|---|---|---|---|---|---|---|---|", flush=True)
        for precision in options.precision or PRECISIONS:
            fields = {"target": options.target, "storage": options.storage, "precision": precision}
            fields["first_last_8bit"] = True
            naive_change = 0.0
            for method in [NAIVE, *(m for m in METHODS if m != NAIVE and m in (options.method or METHODS))]:
                row = measure(zoo, case, before, method, fields)
                naive_change = row.change if method == NAIVE else naive_change
                print(show(precision, row, naive_change), flush=True)


if __name__ == "__main__":
    main()
