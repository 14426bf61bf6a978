"""Mixed precision at 4 bits of weight in the mean beside 4 bits everywhere, on real models, as a Markdown table.

    python -m benchmarks.mixed_precision [--budget bits=4] [--max-drop 0.5] [--target cpu] [--zoo DIR] [case ...]

Activations have 8 bits. The model is searched on half of the evaluation samples; SQNR and score, in percent or in the
case's own units, are those of the other half, which nothing was chosen by. With --max-drop the smallest model is
searched that keeps the score on both halves.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import qdqtool
from benchmarks.zoo import DEFAULT, load_zoo
from qdqtool.mixed_precision.results import Trial

CASES = (
    "resnet20_cifar10",
    "resnet8_cifar10",
    "mobilenetv2_small_cifar10",
    "mobilenetv1_vww",
    "dscnn_kws",
    "kwt1_kws",
    "autoencoder_toycar",
    "tiny_darknet_imagenet",
)
_CASE: dict[str, Any] = {}
"""The case that is measured, for :func:`score`, which the search calls by name."""


def score(outputs: Mapping[str, Any], positions: Any) -> Any:
    """Percent right of each sample; ``positions`` among the evaluation samples stand for labels."""
    case, before = _CASE["case"], _CASE["outputs"]
    whole = [values.copy() for values in before]
    for values, found in zip(whole, outputs.values(), strict=True):
        values[positions] = found.reshape(len(found), *values.shape[1:])
    return 100.0 * case.correct(whole)[positions]


def search(zoo: Any, name: str, **options: Any) -> qdqtool.SearchResult:
    case = zoo.load(name)
    count = len(next(iter(case.evaluation.values())))
    _CASE.update(case=case, outputs=zoo.run(case.model, case))
    scored = case.correct(_CASE["outputs"]) is not None
    return qdqtool.search(
        str(case.model),
        zoo.feeds(case, 100),
        evaluation=[_feed(case, index) for index in range(count)],
        labels=np.arange(count) if scored else None,
        metric=f"{__name__}:score" if scored else None,
        provider="cpu",
        **options,
    )


def _feed(case: Any, index: int) -> dict[str, Any]:
    return {name: values[index : index + 1] for name, values in case.evaluation.items()}


def _figures(trial: Trial | None) -> str:
    if trial is None:
        return " |  | "
    drop = "" if trial.holdout.drop is None else f"{trial.holdout.score:.2f} ({-trial.holdout.drop:+.2f})"
    return f"{trial.holdout.sqnr_db:.2f} | {drop} | {trial.bytes / 1000:.0f}"


def show(name: str, result: qdqtool.SearchResult, seconds: float) -> str:
    base, best = result.baseline, result.best
    gain = "" if base is None else f"{best.holdout.sqnr_db - base.holdout.sqnr_db:+.2f}"
    widths = [sum(width == other for other in result.chosen.values()) for width in result.widths]
    used = ", ".join(f"{width}: {n}" for width, n in zip(result.widths, widths, strict=True) if n)
    return (
        f"| {name} | {_figures(base)} | {_figures(best)} | {gain} | {best.bits:.2f} | {used} "
        f"| {len(result.trials)} | {seconds:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", default=DEFAULT, type=Path)
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--budget", default="bits=4")
    parser.add_argument("--max-drop", type=float)
    parser.add_argument("cases", nargs="*")
    options = parser.parse_args()
    goal = {"budget": options.budget} if options.max_drop is None else {"max_drop": options.max_drop}
    print("| case | uniform, dB | score | kB | mixed, dB | score | kB | gain, dB | mean bits | layers | models | s |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    zoo = load_zoo(options.zoo)
    for name in options.cases or CASES:
        start = time.perf_counter()
        result = search(zoo, name, target=options.target, **goal)
        print(show(name, result, time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    main()
