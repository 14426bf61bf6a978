"""Statistics files: a zip archive of one JSON header and plain .npy arrays, no pickle; written byte for byte the same.

    header.json    what they belong to, and a list of the tensors, by name, with their single figures
    samples.npy    (samples,) of digest (16 bytes) and position (int64), by position
    extremes.npy   float32 (tensors, samples, 2): least and greatest finite value, NaN where there was none
    bins.npy       uint32: the upper 19 bits of the float32 values in each occupied bin, tensor after tensor
    counts.npy     int64: how many values each of these bins holds
    offsets.npy    int64 (tensors + 1,): where each tensor's bins begin
    channels/N/*   statistics of each channel of tensor N, where they were asked for

The version of the format is part of the header; a file of another version is refused.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

import qdqtool
from qdqtool.data.batching import Batching
from qdqtool.errors import StatisticsError
from qdqtool.observation.atomic import replacing
from qdqtool.observation.calibration import Calibration, ModelKey, Source
from qdqtool.statistics.histogram import Histogram
from qdqtool.statistics.tensor import RECORD, Statistics, TensorStatistics

FORMAT: Final = "qdqtool statistics"
VERSION: Final = 1
_SAMPLE: Final = np.dtype([("sample", "S16"), ("position", "<i8")])
_LEVEL: Final = 1  # of compression: the next ones take three times as long for some per cent


def write(calibration: Calibration, path: str | os.PathLike[str]) -> Path:
    """Write statistics atomically: the file appears whole under its name, or not at all.

    Raises:
        StatisticsError: the folder does not exist or cannot be written, or the tensors were not all observed on the
            same samples.
    """
    target = Path(path)
    try:
        with replacing(target) as staged:
            _write(calibration, staged)
    except OSError as error:
        raise StatisticsError(f"cannot write {target}: {error}") from error
    return target


def read(path: str | os.PathLike[str]) -> Calibration:
    """Read a statistics file.

    Raises:
        StatisticsError: it cannot be read, is damaged, or of another kind or version.
    """
    source = Path(path)
    try:
        with zipfile.ZipFile(source) as archive:
            header = json.loads(archive.read("header.json")) if "header.json" in archive.namelist() else {}
            if header.get("format") != FORMAT:
                raise StatisticsError(f"{source} is no statistics file; make one with 'qdqtool observe'")
            if header["version"] != VERSION:
                raise StatisticsError(
                    f"{source} has version {header['version']} of the format, this program reads {VERSION}; "
                    "observe again"
                )
            return _calibration(header, archive)
    except StatisticsError:
        raise
    except FileNotFoundError:
        raise StatisticsError(f"statistics file {source} does not exist") from None
    except Exception as error:  # zipfile, zlib, json and numpy raise a dozen unrelated kinds where a file is damaged
        kind = type(error).__name__
        raise StatisticsError(f"{source} is no readable statistics file ({kind}: {error}); observe again") from error


def _write(calibration: Calibration, path: Path) -> None:
    tensors = dict(sorted(calibration.statistics.tensors.items()))  # equal statistics make equal files
    records = [stats.records for stats in tensors.values()]
    keys = [record[["sample", "position"]].astype(_SAMPLE) for record in records]
    if any(key.tobytes() != keys[0].tobytes() for key in keys):
        raise StatisticsError("statistics of tensors that were not all observed on the same samples make no file")
    bins = [stats.histogram.arrays() for stats in tensors.values()]
    header = {
        "format": FORMAT,
        "version": VERSION,
        "made_by": f"qdqtool {qdqtool.__version__}",
        "runtime": calibration.runtime,
        "model": dataclasses.asdict(calibration.model),
        "sources": [dataclasses.asdict(source) for source in calibration.sources],
        "batching": dataclasses.asdict(calibration.batching),
        "samples": calibration.statistics.samples,
        "tensors": [_figures(name, stats) for name, stats in tensors.items()],
    }
    arrays = {
        "samples": keys[0] if keys else np.empty(0, _SAMPLE),
        "extremes": np.array([np.stack([r["lo"], r["hi"]], axis=-1) for r in records], np.float32),
        "bins": _joined([places for places, _ in bins], np.uint32),
        "counts": _joined([counts for _, counts in bins], np.int64),
        "offsets": np.cumsum([0, *(counts.size for _, counts in bins)], dtype=np.int64),
    }
    for index, stats in enumerate(tensors.values()):
        for name, values in (stats.channels.arrays() if stats.channels is not None else {}).items():
            arrays[f"channels/{index}/{name}"] = values
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=_LEVEL) as archive:
        _put(archive, "header.json", json.dumps(header, indent=1).encode())
        for name, values in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, values, allow_pickle=False)
            _put(archive, f"{name}.npy", buffer.getbuffer())


def _put(archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    info = zipfile.ZipInfo(name)  # without the time, which would make each file another
    info.compress_type = zipfile.ZIP_DEFLATED
    archive.writestr(info, content)


def _figures(name: str, stats: TensorStatistics) -> dict[str, Any]:
    first = stats.first_non_finite
    return {
        "name": name,
        "zeros": stats.histogram.zeros,
        "nan": stats.nan,
        "inf": stats.inf,
        "first_non_finite": None if first is None else [first[0], first[1].hex()],
        "axis": None if stats.channels is None else stats.channels.axis,
    }


def _joined(parts: list[npt.NDArray[Any]], dtype: type) -> npt.NDArray[Any]:
    return np.concatenate(parts).astype(dtype) if parts else np.empty(0, dtype)


def _calibration(header: dict[str, Any], archive: zipfile.ZipFile) -> Calibration:
    samples, extremes, bins, counts, offsets = (
        _array(archive, name) for name in ("samples", "extremes", "bins", "counts", "offsets")
    )
    tensors = {}
    for index, figures in enumerate(header["tensors"]):
        record = np.empty(samples.size, RECORD)
        record["sample"], record["position"] = samples["sample"], samples["position"]
        record["lo"], record["hi"] = extremes[index].T
        inside = slice(*offsets[index : index + 2])
        first = figures["first_non_finite"]
        tensors[figures["name"]] = TensorStatistics.of(
            Histogram.from_arrays(figures["zeros"], bins[inside], counts[inside]),
            record,
            nan=figures["nan"],
            inf=figures["inf"],
            first_non_finite=None if first is None else (first[0], bytes.fromhex(first[1])),
            channels=_channels(figures["axis"], index, archive),
        )
    return Calibration(
        ModelKey(**header["model"]),
        Statistics(tensors, header["samples"]),
        tuple(Source(**source) for source in header["sources"]),
        Batching(**header["batching"]),
        header["runtime"],
    )


def _channels(axis: int | None, index: int, archive: zipfile.ZipFile) -> Any:
    if axis is None:
        return None
    from qdqtool.statistics.channel_statistics import ChannelStatistics

    prefix = f"channels/{index}/"
    names = [n.removeprefix(prefix).removesuffix(".npy") for n in archive.namelist() if n.startswith(prefix)]
    arrays = {name: _array(archive, f"{prefix}{name}") for name in names}
    try:
        return ChannelStatistics.from_arrays(axis, arrays)
    except StatisticsError as error:  # which does not know the file
        raise ValueError(error) from error


def _array(archive: zipfile.ZipFile, name: str) -> npt.NDArray[Any]:
    with archive.open(f"{name}.npy") as file:
        values: npt.NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    return values
