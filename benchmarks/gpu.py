"""Every precision on a GPU in one table: latency, device memory, SQNR, and what runs where.

    python -m benchmarks.gpu --out FOLDER [--provider cuda] [--quick] [--zoo FOLDER] [--cases NAME,...] [--batch 1,8,64]

needs an onnxruntime with CUDA: installed, or a folder of one first on PYTHONPATH with its libraries on LD_LIBRARY_PATH,
as in ``PYTHONPATH=ORT_WITH_CUDA LD_LIBRARY_PATH=CUDA_LIBRARIES python -m benchmarks.gpu --out FOLDER``. Nothing is
downloaded. ``--provider cpu --quick`` runs the same code on small models without a GPU; on one it was not run yet.

Each cell (a model in one precision; a model at one batch size) runs in a process of its own. Where one crashes, its
reason stands in the table, and FOLDER/gpu.json and FOLDER/gpu.md, written after each cell, keep all others. Cases that
stand there from an earlier run with the same versions stay, so that ``--cases`` can split the work. SQNR is
against float32 on the CPU. Ratios are of medians, relative to float32 with TF32 as the provider has it, all precisions
interleaved; "replayed" is the time with CUDA graphs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx

import qdqtool
from benchmarks import synthetic
from benchmarks.gpu_table import markdown
from benchmarks.zoo import DEFAULT, load_zoo
from qdqtool import runtime
from qdqtool.report import files
from qdqtool.report.values import plain
from qdqtool.verification import latency, memory, partition, placement
from qdqtool.verification.latency import Variant
from qdqtool.verification.listing import counts, listing
from qdqtool.verification.sqnr import Sqnr
from qdqtool.verification.variants import WITHOUT_TF32

NO_TF32: Final = "float32-no-tf32"
FORMS: Final[Mapping[str, Mapping[str, Any]]] = {
    "float32": {},
    NO_TF32: {},
    "fp16": {"precision": "fp16"},
    "w8a8": {"precision": "w8a8"},
    "w8a16": {"precision": "w8a16"},
    "w4a16": {"precision": "w4a16"},
    "w8a16-fp16": {"precision": "w8a16", "float16": True},
    "w4a16-fp16": {"precision": "w4a16", "float16": True},
}
"""What a model is measured in -> how it is quantized; float32 stays as it is."""
SAMPLES: Final = 16
QUICK_CASES: Final = ("dscnn_kws",)
LIMIT: Final = 1800.0  # seconds a cell may take


def prepare(case: str, folder: Path, *, quick: bool, zoo: Path) -> None:
    """Write a case's float model as ``float.onnx`` and samples as ``samples.npz``, whose items are whole feeds."""
    if case == "resnet50":
        size, width = (32, 8) if quick else (224, 64)
        proto, array = synthetic.resnet50(size=size, width=width), synthetic.images(SAMPLES, size)
        feeds = {"x": array[:, None]}
    elif case == "transformer":
        tokens, width, heads = (8, 64, 4) if quick else (128, 1024, 16)
        proto = synthetic.transformer(tokens=tokens, width=width, heads=heads)
        feeds = {"x": synthetic.embeddings(SAMPLES, tokens, width)[:, None]}
    else:
        module = load_zoo(zoo)
        known = module.load(case)
        proto = onnx.load(known.model)
        samples = module.feeds(known, SAMPLES)
        feeds = {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(proto, folder / "float.onnx")
    np.savez(folder / "samples.npz", allow_pickle=False, **feeds)


def make(folder: Path, form: str, provider: str) -> dict[str, Any]:
    """Bring the float model to a precision, and measure its SQNR and where it runs."""
    samples = _samples(folder)
    path = _path(folder, form)
    if FORMS[form]:
        target = "cpu" if provider == "cpu" else "cuda"
        qdqtool.quantize(folder / "float.onnx", samples, target=target, provider=provider, **FORMS[form]).save(path)
    proto = onnx.load(path)
    config = {} if provider == "cpu" else partition.RECORD
    optimized, active = placement.load(proto, provider=provider, config=config)
    if form == NO_TF32 and provider == "cuda":
        active = runtime.session(proto, provider=provider, provider_options=WITHOUT_TF32)
        parted = None
    else:
        parted = None if provider == "cpu" else partition.read(active, optimized, provider)
    reference = runtime.session(onnx.load(folder / "float.onnx"))
    names = runtime.comparable(reference)
    total = Sqnr()
    for feeds in samples:
        for want, got in zip(*(runtime.run(one, names, feeds) for one in (reference, active)), strict=True):
            total.add(want, got)
    return {
        "sqnr_db": total.db,
        "bytes": path.stat().st_size,
        "placement": counts(listing(proto, optimized, provider=provider, partition=parted)),
        "fallen": 0 if parted is None else len(parted.fallen),
        "copies": 0 if parted is None else len(parted.copies),
        "integer_kernels": sum(
            n for op, n in placement.operators(optimized).items() if placement.is_integer_kernel(op)
        ),
    }


def time(
    folder: Path, wanted: Sequence[str], batch: int, provider: str, *, seconds: float, graphs: bool
) -> dict[str, Any]:
    """Latency of several precisions interleaved, the first being the reference; ``graphs``: with CUDA graphs."""
    sources = {form: _variant(folder, form, provider) for form in wanted}
    feeds = _batch(folder, batch)
    return asdict(latency.bench(sources, feeds, provider=provider, seconds=seconds, strict=False, cuda_graph=graphs))


def peak(folder: Path, form: str, batch: int, provider: str) -> dict[str, Any]:
    """Peak memory of one precision."""
    one = _variant(folder, form, provider)
    options = one.provider_options
    return asdict(memory.peak(one.source, _batch(folder, batch), provider=provider, provider_options=options))


def _variant(folder: Path, form: str, provider: str) -> Variant:
    off = form == NO_TF32 and provider == "cuda"
    return Variant(_path(folder, form), provider_options=WITHOUT_TF32 if off else {})


def _path(folder: Path, form: str) -> Path:
    return folder / ("float.onnx" if not FORMS[form] else f"{form}.onnx")


def _samples(folder: Path) -> list[dict[str, Any]]:
    with np.load(folder / "samples.npz") as arrays:
        found = {name: arrays[name] for name in arrays.files}
    return [{name: array[index] for name, array in found.items()} for index in range(SAMPLES)]


def _batch(folder: Path, batch: int) -> dict[str, Any]:
    from qdqtool.data.source import open_data
    from qdqtool.graphs import model as models

    inputs = models.inputs(models.load(folder / "float.onnx"))
    with open_data(_samples(folder), inputs) as data:
        return dict(latency.batch_of(inputs, data, batch))


CELLS: Final = {"prepare": prepare, "make": make, "time": time, "peak": peak}


def cell(name: str, **arguments: Any) -> dict[str, Any]:
    """Run one of :data:`CELLS` in a process of its own; ``{"failed": reason}`` where it crashes or fails."""
    command = (
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--cell",
        name,
        "--arguments",
        json.dumps(arguments, default=str),
    )
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return {"failed": f"it took more than {LIMIT:g} s"}
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        how = f"signal {-done.returncode}" if done.returncode < 0 else "an error"
        return {"failed": f"{how}: {last}"}
    values: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return values


def run_cell(name: str, arguments: Mapping[str, Any]) -> None:
    """Print the result of a cell as a line of JSON; this is the other end of :func:`cell`."""
    given = {key: Path(value) if key in ("folder", "zoo") else value for key, value in arguments.items()}
    try:
        values = CELLS[name](**given)  # type: ignore[operator]  # functions of different arguments
    except qdqtool.QdqError as error:
        values = {"failed": str(error)}
    print(json.dumps(plain(values or {})))


def measure(case: str, options: argparse.Namespace, table: dict[str, Any], save: Any) -> None:
    """Fill in one case of the table, saving it after every cell."""
    folder = options.out / "models" / case
    found: dict[str, Any] = {"made": {}, "batches": {}}
    table["cases"][case] = found
    found.update(cell("prepare", case=case, folder=folder, quick=options.quick, zoo=options.zoo))
    if "failed" in found:
        save()
        return
    for form in options.forms:
        found["made"][form] = cell("make", folder=folder, form=form, provider=options.provider)
        save()
    wanted = [form for form in options.forms if "failed" not in found["made"][form]]
    for batch in options.batch:
        common = {"folder": folder, "batch": batch, "provider": options.provider}
        both = (False, True) if options.provider == "cuda" else (False,)
        timed = [_timed(wanted, **common, seconds=options.seconds, graphs=graphs) for graphs in both]
        memory = {form: cell("peak", form=form, **common) for form in wanted if options.memory}
        found["batches"][batch] = {"runs": timed[0], "replayed": timed[1:], "memory": memory}
        save()


def _timed(wanted: Sequence[str], **common: Any) -> list[dict[str, Any]]:
    """All precisions interleaved; where that crashes, each beside the reference alone, so that one is lost."""
    whole = cell("time", wanted=wanted, **common)
    if set(whole) != {"failed"} or len(wanted) < 3:
        return [whole]
    found = []
    for form in wanted[1:]:
        one = cell("time", wanted=[wanted[0], form], **common)
        found.append({"failed": {form: one["failed"]}} if set(one) == {"failed"} else one)
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options, with what depends on others filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names: dict[str, Any] = {"type": lambda text: text.split(","), "metavar": "NAME,..."}
    parser.add_argument("--out", type=lambda text: Path(text).absolute(), default=Path("gpu").absolute())
    parser.add_argument("--provider", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small models, few cases, batch 1 and 2")
    parser.add_argument("--zoo", type=Path, default=DEFAULT)
    parser.add_argument("--cases", help="resnet50, transformer, or real models by name", **names)
    parser.add_argument("--forms", help=f"the first is the reference; of {', '.join(FORMS)}", **names)
    parser.add_argument("--batch", type=lambda text: [int(part) for part in text.split(",")], metavar="N,...")
    parser.add_argument("--seconds", type=float, help="for each batch size of a case")
    parser.add_argument(
        "--memory", action=argparse.BooleanOptionalAction, default=True, help="a process for each figure"
    )
    parser.add_argument("--cell", choices=CELLS, help=argparse.SUPPRESS)
    parser.add_argument("--arguments", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.batch = options.batch or ([1, 2] if options.quick else [1, 8, 64])
    options.seconds = options.seconds if options.seconds is not None else 0.0 if options.quick else 5.0
    options.forms = options.forms or [form for form in FORMS if form != NO_TF32 or options.provider == "cuda"]
    unknown = [form for form in options.forms if form not in FORMS]
    if unknown:
        parser.error(f"unknown precision {unknown[0]!r}; known: {', '.join(FORMS)}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything and write the table."""
    options = parse(arguments)
    if options.cell:
        run_cell(options.cell, json.loads(options.arguments))
        return
    runtime.resolve_provider(options.provider)  # says why it does not load
    title = f"qdqtool {qdqtool.__version__}, {runtime.describe(options.provider)}"
    table: dict[str, Any] = {"title": title, "provider": options.provider, "cases": {}}
    before = options.out / "gpu.json"
    if before.is_file():
        known = json.loads(before.read_text(encoding="utf-8"))
        table["cases"] = known["cases"] if known["title"] == title else {}

    def save() -> None:
        files.write_text(json.dumps(plain(table), indent=2), options.out / "gpu.json")
        files.write_text(markdown(table), options.out / "gpu.md")

    for case in options.cases or ["resnet50", "transformer", *_real(options.zoo, quick=options.quick)]:
        print(case, flush=True)
        measure(case, options, table, save)
    print(markdown(table))


def _real(zoo: Path, *, quick: bool) -> Sequence[str]:
    """Names of real models, where there are any."""
    if not (zoo / "zoo.py").is_file():
        return ()
    return QUICK_CASES if quick else load_zoo(zoo).names()


if __name__ == "__main__":
    main()
