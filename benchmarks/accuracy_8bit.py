"""Accuracy of w8a8 models with default settings on real models beside the best other tool's, as a Markdown table.

    python -m benchmarks.accuracy_8bit [--target cpu] [--calibrator mse] [--no-bias-correction] [--zoo DIR] [case ...]

SQNR is that of the first output over all evaluation samples on the fused runtime; p is McNemar's exact test on paired
right answers.
"""

from __future__ import annotations

import argparse
import csv
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

import qdqtool
from benchmarks.zoo import DEFAULT, load_zoo

SEPARATE = {"tiny_darknet_imagenet", "kwt1_kws"}  # hard for every tool: reported, kept out of the mean


@dataclass(frozen=True)
class Row:
    """One case: float and quantized score, SQNR in dB, the best peer's, McNemar p, seconds, size ratio, kernels."""

    case: str
    float_score: float
    score: float
    sqnr_db: float
    peer_db: float
    peer: str
    p: float | None
    seconds: float
    size: float
    kernels: int


def sqnr(reference: np.ndarray[Any, Any], value: np.ndarray[Any, Any]) -> float:
    x = reference.astype(np.float64)
    noise = ((x - value) ** 2).sum()
    return float("inf") if noise == 0 else 10 * float(np.log10((x**2).sum() / noise))


def best_peers(zoo: Path) -> dict[str, tuple[float, str]]:
    """Case -> (SQNR in dB, tool) of the best other tool."""
    best: dict[str, tuple[float, str]] = {}
    with (zoo / "peers_8bit.tsv").open() as file:
        for row in csv.DictReader(file, delimiter="\t"):
            if row["sqnr_db"]:
                found = (float(row["sqnr_db"]), row["tool"])
                best[row["case"]] = max(best.get(row["case"], (-99.0, "")), found)
    return best


def measure(zoo: Any, name: str, fields: dict[str, Any], peers: dict[str, tuple[float, str]]) -> Row:
    case = zoo.load(name)
    start = time.perf_counter()
    result = qdqtool.quantize(str(case.model), zoo.feeds(case, 100), **fields, provider="cpu", cache=False)
    seconds = time.perf_counter() - start
    before, after = zoo.run(case.model, case), zoo.run(result.model.SerializeToString(), case)
    p = None
    if case.hits is not None:
        right, still = case.correct(before), case.correct(after)
        lost, won = int((right & ~still).sum()), int((~right & still).sum())
        p = float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0
    score = case.score or (lambda _: float("nan"))
    peer_db, peer = peers.get(name, (float("nan"), "-"))
    sizes = result.report.sizes
    return Row(name, score(before), score(after), sqnr(before[0], after[0]), peer_db, peer, p, seconds,
               sizes.quantized_bytes / sizes.float_bytes, result.report.integer_kernels)  # fmt: skip


def show(row: Row) -> str:
    p = "" if row.p is None else f"{row.p:.2f}"
    scores = f"{row.float_score:.2f} | {row.score:.2f} | {row.score - row.float_score:+.2f} | {p}"
    peer = "" if np.isnan(row.peer_db) else f"{row.peer_db:.2f} ({row.peer})"
    return (
        f"| {row.case} | {scores} | {row.sqnr_db:.2f} | {peer} | {row.size:.2f} | {row.kernels} | {row.seconds:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", default=DEFAULT, type=Path)
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--calibrator", default="mse")
    parser.add_argument("--no-bias-correction", action="store_true")
    parser.add_argument("cases", nargs="*")
    options = parser.parse_args()
    zoo, peers = load_zoo(options.zoo), best_peers(options.zoo)
    fields = {
        "target": options.target,
        "calibrator": options.calibrator,
        "bias_correction": not options.no_bias_correction,
    }
    print("| case | float | w8a8 | change | McNemar p | SQNR dB | best other tool, dB | size | integer kernels | s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    rows = []
    for name in options.cases or zoo.names():
        rows.append(measure(zoo, name, fields, peers))
        print(show(rows[-1]), flush=True)
    compared = [r for r in rows if not np.isnan(r.peer_db) and r.case not in SEPARATE]
    if compared:
        differences = [r.sqnr_db - r.peer_db for r in compared]
        worst = compared[int(np.argmin(differences))]
        print(
            f"\nSQNR minus the best other tool's: mean {np.mean(differences):+.2f} dB, "
            f"least {min(differences):+.2f} dB ({worst.case})"
        )
    scored = [r.score - r.float_score for r in rows if not np.isnan(r.score)]
    if scored:
        print(f"Score: mean change {np.mean(scored):+.2f}, least {min(scored):+.2f}")


if __name__ == "__main__":
    main()
