"""What calibration costs: observation against plain inference, thresholds, memory, and onnxruntime's calibration.

    python -m benchmarks.calibration [--zoo FOLDER] [--rounds 5] [case ...]

All times of a row are medians of rounds in which each contender runs once, in turn. *Plain* is the float model on the
runtime's default session, in batches of the size that observation chooses. Every time includes loading the model, none
includes preparing it. onnxruntime's Percentile calibration gets the same prepared model, in the nearest smaller batches
that are all full.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.zoo import DEFAULT, load_zoo
from qdqtool import pipeline, registry, runtime
from qdqtool.calibrator_api import choose
from qdqtool.data.source import open_data
from qdqtool.graphs import model as models
from qdqtool.observation.collect import Collected, collect
from qdqtool.planning.plan import Plan
from qdqtool.statistics.tensor import TensorStatistics

CASES = ["resnet56_cifar10", "tiny_darknet_imagenet", "kwt1_kws"]
SAMPLES = 100
SPIN = {"session.intra_op.allow_spinning": "1"}  # the runtime's own default


def joined(feeds: Sequence[Mapping[str, Any]], size: int) -> list[dict[str, Any]]:
    """Samples in batches."""
    groups = [feeds[i : i + size] for i in range(0, len(feeds), size)]
    return [{name: np.concatenate([f[name] for f in group]) for name in group[0]} for group in groups]


def plain(proto: onnx.ModelProto, batches: Sequence[Mapping[str, Any]]) -> None:
    active = runtime.session(proto, config=SPIN)
    for batch in batches:
        active.run(None, batch)


def ort_percentile(proto: onnx.ModelProto, batches: Sequence[Mapping[str, Any]]) -> None:
    """The other calibration: every tensor that its quantizer would ask for, and their thresholds."""
    import tempfile

    from onnxruntime.quantization.calibrate import CalibrationDataReader, CalibrationMethod, create_calibrator
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # the package has no type hints
        def __init__(self) -> None:
            self.rest = iter(batches)

        def get_next(self) -> Mapping[str, Any] | None:
            return next(self.rest, None)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(proto, path)
        operators = list({*QDQRegistry, *QLinearOpsRegistry})
        method = CalibrationMethod.Percentile
        calibrator = create_calibrator(
            path, operators, augmented_model_path=str(path.with_name("augmented.onnx")), calibrate_method=method
        )
        with contextlib.redirect_stdout(io.StringIO()):  # it tells of its progress there
            calibrator.collect_data(Reader())
            calibrator.compute_data()


def thresholds(plan: Plan, seen: Collected) -> dict[str, float]:
    """Seconds that each calibrator takes for all tensors; what all of them share (bins and their sums) comes apart."""
    specs = [(plan.tensors[key], spec) for key, spec in plan.specs() if key not in plan.constants and not spec.fixed]
    start = time.perf_counter()
    for stats in seen.calibration.statistics.tensors.values():
        _ = stats.bins.inside
    found = {"bins": time.perf_counter() - start}
    for name in registry.catalogue("calibrators"):
        calibrator = registry.make("calibrators", name, {})
        start = time.perf_counter()
        for tensor, spec in specs:
            choose(calibrator, seen.calibration.statistics[tensor], spec)
        found[name] = time.perf_counter() - start
    return found


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(zoo: Any, name: str, rounds: int) -> tuple[str, dict[str, float]]:
    case = zoo.load(name)
    feeds = zoo.feeds(case, SAMPLES)
    state, _ = pipeline.dry_run(str(case.model), target="cpu")
    assert state.plan is not None
    proto, tensors = models.to_proto(state.graph, state.header), state.plan.observed()
    with open_data(feeds, models.inputs(proto)) as data:
        seen = collect(proto, tensors, data)
        batches = joined(feeds, seen.calibration.batching.size)
        even = max(
            n for n in range(1, seen.calibration.batching.size + 1) if SAMPLES % n == 0
        )  # a short last batch breaks ort
        even_batches = joined(feeds, even)
        work = {
            "plain": lambda: plain(onnx.load(case.model), batches),
            "observe": lambda: collect(proto, tensors, data),
            "ort": lambda: ort_percentile(proto, even_batches),
        }
        times: dict[str, list[float]] = {key: [] for key in work}
        for _ in range(rounds):
            for key, one in work.items():
                times[key].append(timed(one))
    took = {key: float(np.median(values)) for key, values in times.items()}
    spent = thresholds(state.plan, seen)
    values = sum(seen.calibration.statistics[t].count for t in tensors) / 1e6
    both = took["observe"] + sum(spent.values())
    row = (
        f"| {name} | {len(tensors)} | {values:.0f} M | {took['plain']:.2f} | {took['observe']:.2f} | "
        f"{took['observe'] / took['plain']:.2f} | {sum(spent.values()):.2f} | {took['ort']:.2f} | "
        f"{both / took['ort']:.2f} |"
    )
    return row, {key: seconds / len(tensors) * 1e3 for key, seconds in spent.items()}


def nanoseconds() -> dict[str, float]:
    """Time of counting one value on one core, by the kind of values; the least of ten."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((64, 1 << 14)).astype(np.float32)
    kinds = {
        "normal": normal,
        "rectified": np.maximum(normal, 0),
        "t3": rng.standard_t(3, normal.shape).astype(np.float32),
        "uniform": rng.random(normal.shape, np.float32),
    }
    keys = [(bytes(15) + b"\1", i) for i in range(64)]
    found = {}
    for kind, values in kinds.items():
        stats = TensorStatistics()
        stats.observe(values, keys)
        least = min(timed(lambda s=stats, v=values: s.observe(v, keys)) for _ in range(10))  # type: ignore[misc]
        found[kind] = least / values.size * 1e9
    return found


def peak(zoo: Path, name: str, samples: int) -> float:
    """MiB that observing so many samples adds to the process's peak, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.calibration", "--zoo", str(zoo), "--peak", str(samples), name]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def print_peak(zoo: Any, name: str, samples: int) -> None:
    import tempfile

    case = zoo.load(name)
    given = zoo.feeds(case, SAMPLES)
    state, _ = pipeline.dry_run(str(case.model), target="cpu")
    assert state.plan is not None
    proto, tensors = models.to_proto(state.graph, state.header), state.plan.observed()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.npz"
        several = (joined([given[i % len(given)] for i in range(samples)], samples))[0]
        rng = np.random.default_rng(0)
        noisy = {
            k: v + rng.normal(0, 1e-3, v.shape).astype(v.dtype) if v.dtype.kind == "f" else v
            for k, v in several.items()
        }
        np.savez(path, **noisy)
        script = (
            "import onnx; from qdqtool.graphs import model as m; from qdqtool.data.source import open_data; "
            "from qdqtool.observation.collect import collect; from qdqtool import runtime; "
            f"proto = onnx.load({str(Path(folder) / 'model.onnx')!r}); runtime.session(proto); "
            "open('/proc/self/clear_refs', 'w').write('5'); "  # the peak from here on
            "kib = lambda key: int([l for l in open('/proc/self/status') if l.startswith(key)][0].split()[1]); "
            "start = kib('VmRSS'); "
            f"collect(proto, {list(tensors)!r}, open_data({str(path)!r}, m.inputs(proto))); "
            "print((kib('VmHWM') - start) / 1024)"
        )
        onnx.save(proto, Path(folder) / "model.onnx")
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    print(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", default=DEFAULT, type=Path)
    parser.add_argument("--rounds", default=5, type=int)
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    parser.add_argument("cases", nargs="*")
    options = parser.parse_args()
    zoo = load_zoo(options.zoo)
    if options.peak:
        print_peak(zoo, options.cases[0], options.peak)
        return
    print("one value is counted in " + ", ".join(f"{ns:.1f} ns ({kind})" for kind, ns in nanoseconds().items()))
    print("\n| case | tensors | values | plain s | observe s | ratio | all calibrators s | ort s | both / ort |")
    print("|---|---|---|---|---|---|---|---|---|")
    spent = {}
    for name in options.cases or CASES:
        row, spent[name] = measure(zoo, name, options.rounds)
        print(row, flush=True)
    print("\n| ms a tensor | " + " | ".join(next(iter(spent.values()))) + " |")
    print("|---" * (1 + len(next(iter(spent.values())))) + "|")
    for name, times in spent.items():
        print(f"| {name} | " + " | ".join(f"{ms:.1f}" for ms in times.values()) + " |")
    print("\n| peak MiB above the loaded model | 64 samples | 1024 samples | ratio |\n|---|---|---|---|")
    for name in options.cases or CASES:
        few, many = (peak(options.zoo, name, n) for n in (64, 1024))
        print(f"| {name} | {few:.1f} | {many:.1f} | {many / few:.3f} |", flush=True)


if __name__ == "__main__":
    main()
