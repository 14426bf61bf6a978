"""Latency of w8a8 models on the CPU provider, float, ours and other tools' interleaved, and the time quantizing takes.

    python -m benchmarks.speed_8bit --peers VENV/bin/python [--zoo FOLDER] [--batch 1] [case ...]

VENV holds onnxruntime, onnx, onnxsim, pillow and numpy. Ratios are of medians over all rounds; each round runs every
model once.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import qdqtool
from benchmarks.zoo import DEFAULT, load_zoo
from qdqtool import runtime
from qdqtool.verification.placement import load_and_count

CASES = ["resnet8_cifar10", "resnet20_cifar10", "resnet56_cifar10", "mobilenetv2_small_cifar10", "mobilenetv2_imagenet",
         "tiny_darknet_imagenet"]  # fmt: skip
SPIN = {"session.intra_op.allow_spinning": "1"}  # the runtime's own default
TOOLS = ("ort", "onnxsim")


def make_peer(python: str, tool: str, zoo: Path, case: str, output: Path) -> float | None:
    """Seconds the other tool takes to write ``output``; None where it fails."""
    script = str(Path(__file__).with_name("make_peer.py"))
    done = subprocess.run(
        [python, script, tool, str(zoo), case, str(output)], capture_output=True, text=True, check=False
    )
    return float(done.stdout.split()[-1]) if done.returncode == 0 else None


def medians(models: dict[str, onnx.ModelProto], feeds: dict[str, Any], seconds: float) -> dict[str, float]:
    """Median milliseconds of each model, all interleaved, for about ``seconds``."""
    sessions = {name: runtime.session(model, config=SPIN) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for active in sessions.values():
        for _ in range(5):
            active.run(None, feeds)
    end = time.perf_counter() + seconds
    rng = np.random.default_rng(0)
    while time.perf_counter() < end:
        for name in rng.permutation(list(sessions)):  # whoever runs behind the largest model finds the caches cold
            active = sessions[name]
            start = time.perf_counter()
            active.run(None, feeds)
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: float(np.median(values)) for name, values in times.items()}


def our_seconds(zoo: Any, case: Any) -> tuple[Any, float]:
    feeds = zoo.feeds(case, 100)
    start = time.perf_counter()
    result = qdqtool.quantize(str(case.model), feeds, target="cpu", provider="cpu", cache=False)
    return result, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", default=DEFAULT, type=Path)
    parser.add_argument("--peers", required=True)
    parser.add_argument("--batch", default=1, type=int)
    parser.add_argument("--seconds", default=8.0, type=float)
    parser.add_argument("cases", nargs="*")
    options = parser.parse_args()
    zoo = load_zoo(options.zoo)
    print(
        "| case | float ms | ours | ort | onnxsim | ours / faster of both | "
        "Conv, Gemm, MatMul left float | quantize s | ort MinMax s | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in options.cases or CASES:
        case = zoo.load(name)
        ours_first, _ = our_seconds(zoo, case)
        with tempfile.TemporaryDirectory() as folder:
            taken, models = {}, {"float": onnx.load(case.model), "ours": ours_first.model}
            for tool in TOOLS:
                path = Path(folder) / f"{tool}.onnx"
                taken[tool] = make_peer(options.peers, tool, options.zoo, name, path)
                if taken[tool] is not None:
                    models[tool] = onnx.load(path)
            _, seconds = our_seconds(zoo, case)
        feeds = {k: np.concatenate([f[k] for f in zoo.feeds(case, options.batch)]) for k in zoo.feeds(case, 1)[0]}
        found = medians(models, feeds, options.seconds)
        kernels = Counter(load_and_count(ours_first.model)[0])
        left = sum(kernels[op] for op in ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"))
        ratios = " | ".join(f"{found[t] / found['float']:.2f}" if t in found else "failed" for t in ("ours", *TOOLS))
        best = min((found[t] for t in TOOLS if t in found), default=float("nan"))
        ort = taken["ort"]
        times = f"{seconds:.2f} | {ort:.2f} | {seconds / ort:.2f}" if ort else f"{seconds:.2f} | failed | "
        print(
            f"| {name} | {found['float']:.2f} | {ratios} | {found['ours'] / best:.2f} | {left} | {times} |", flush=True
        )


if __name__ == "__main__":
    main()
