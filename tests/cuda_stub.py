"""Builds CUDA libraries that do nothing, with which the runtime's CUDA provider loads where there is no GPU.

The runtime then partitions and optimizes a graph as it does on a GPU; what the graph computes means nothing. The few
functions that must answer are in ``tests/stubs/cuda``; every other one that the provider wants is made here, so that
the list is right for any version of it.
"""

from __future__ import annotations

import importlib.util
import mmap
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import onnx

from qdqtool.graphs import model as models
from qdqtool.verification.partition import Partition, partition_apart

SOURCES: Final = Path(__file__).parent / "stubs" / "cuda"
_CUDA: Final = re.compile(r"lib(cuda|cudart|cublas|cublasLt|cudnn|cufft|curand|nvrtc|nvJitLink)\.so\.\d+")
_LOADED: Final = {"libcudnn.so.9": re.compile(rb"\0(cudnn[A-Z]\w+)(?=\0)")}
"""Libraries that the provider opens by itself -> what it looks up in them, which only its strings tell."""
_HEADERS: Final = "".join(f"#include <{name}.h>\n" for name in ("stddef", "stdint", "stdlib", "string"))
_UNVERSIONED: Final = {"cuda": r"cu[A-Z]\w+", "curand": r"curand\w+", "cufft": r"cufft\w+", "cudnn": r"cudnn\w+"}


@dataclass(frozen=True)
class CudaStub:
    """Called with a model it gives the model's partition on CUDA; its libraries are in ``folder``."""

    folder: Path

    def __call__(
        self, proto: onnx.ModelProto, config: Mapping[str, str] | None = None, optimized: Path | None = None
    ) -> Partition:
        """Partition a model, with further session configuration entries, in a process of its own.

        The graph that runs is saved as ``optimized``.
        """
        path = models.save(proto, self.folder / f"{uuid.uuid4().hex}.onnx")
        return partition_apart(path, self.folder, config=config, optimized=optimized)


def provider() -> Path | None:
    """The library of the runtime's CUDA provider; None where this build of the runtime has none."""
    spec = importlib.util.find_spec("onnxruntime")
    folders = [] if spec is None else spec.submodule_search_locations or []
    found = [Path(folder) / "capi" / "libonnxruntime_providers_cuda.so" for folder in folders]
    return next((path for path in found if path.is_file()), None)


def obstacle() -> str | None:
    """Why the stubs cannot be built here, in a few words; None where they can."""
    if sys.platform != "linux":
        return "stub libraries are built on Linux alone"
    if provider() is None:
        return "this build of onnxruntime has no CUDA provider"
    missing = [tool for tool in ("cc", "nm", "readelf") if shutil.which(tool) is None]
    if missing:
        return f"no {missing[0]} to build stub libraries with"
    tried = subprocess.run(
        ("cc", "-fsyntax-only", "-xc", "-"), input=_HEADERS, capture_output=True, text=True, check=False
    )
    return None if tried.returncode == 0 else "no C compiler with the headers of the standard library"


def build(folder: Path) -> None:
    """Compile every library that the CUDA provider needs into ``folder``."""
    wanted = provider()
    assert wanted is not None
    for library, symbols in _symbols(wanted).items():
        _compile(folder, library, symbols)


def _symbols(wanted: Path) -> dict[str, set[str]]:
    """Library -> the functions that the provider takes from it."""
    needed = re.findall(r"NEEDED.*\[(.+)\]", _run("readelf", "-d", wanted))
    found: dict[str, set[str]] = {name: set() for name in (*needed, *_LOADED) if _CUDA.fullmatch(name)}
    for line in _run("nm", "-D", "--undefined-only", wanted).splitlines():
        name, _, version = line.split()[-1].partition("@")
        if version.strip("@") in found:
            found[version.strip("@")].add(name)
        for library, names in found.items():
            if not version and re.fullmatch(_UNVERSIONED.get(_stem(library), "(?!)"), name):
                names.add(name)
    with wanted.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for library, pattern in _LOADED.items():
            found[library] |= {match.decode() for match in pattern.findall(content)}
    return found


def _compile(folder: Path, library: str, symbols: set[str]) -> None:
    """One library: what is written by hand, and functions that return 0 for the rest."""
    written, part = SOURCES / f"{_stem(library)}.c", folder / f"{library}.o"
    objects, names = [], set()
    if written.is_file():
        _run("cc", "-std=c11", "-Wall", "-Wextra", "-O1", "-fPIC", "-c", written, "-o", part)
        objects, names = [part], {line.split()[-1] for line in _run("nm", "--defined-only", "-g", part).splitlines()}
    rest, exported = folder / f"{library}.c", folder / f"{library}.map"
    rest.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(symbols - names)))
    shown = " ".join(f"{name};" for name in sorted(symbols | names))
    exported.write_text(f"{library} {{ {f'global: {shown}' if shown else ''} local: *; }};\n")
    link = (f"-Wl,-soname,{library}", f"-Wl,--version-script={exported}")
    _run("cc", "-shared", "-fPIC", *link, "-o", folder / library, rest, *objects)


def _stem(library: str) -> str:
    return library.removeprefix("lib").partition(".")[0]


def _run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
