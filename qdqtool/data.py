"""Whatever a user calls data -> a replayable stream of feeds that fit the model.

Arrays (.npz, .npy, a dict) hold samples: of the model input's rank, along axis 0, and every feed is one row [i:i+1];
of one rank more, every item [i] is one whole feed. Dicts from an iterable and .pb files are whole feeds.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qdqtool.errors import DataError
from qdqtool.fit import Feeds, as_array, fit, is_input, only_input, row_shapes, sample_shapes, whole_shapes
from qdqtool.spool import Spool

if TYPE_CHECKING:
    from qdqtool.images import ImagePreprocessing
    from qdqtool.model import InputInfo

LABELS = "labels"
_SOURCES = """\
  data.npz, or a dict of arrays   named as the model's inputs, samples along axis 0
  data.npy                        the same, for a model of one input
  a folder                        of .npz, .npy or image files, or with test_data_set_*/input_*.pb
  an iterable of dicts            each a feed {input name: array}; or an object with get_next()
  "synthetic:N"                   N random samples, only for trying things out: their ranges mean nothing"""


class Data:
    """A replayable stream of feeds; iterating again gives the same feeds in the same order.

    A feed maps every model input to one C-contiguous array of the input's rank and dtype. An array may be a read-only
    view of the user's own.

    Raises:
        DataError: while iterating, where a feed does not fit, a file is unreadable, or there is no sample at all.
    """

    def __init__(
        self,
        name: str,
        replay: Callable[[], Iterator[Feeds]],
        *,
        count: int | None = None,
        unit: str = "sample",
        synthetic: bool = False,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        self.synthetic = synthetic
        self._name, self._unit, self._count = name, unit, count
        self._replay = replay
        self._finalizer = weakref.finalize(self, release)

    @property
    def count(self) -> int | None:
        """How many feeds there are; None before the first complete pass over a source that cannot tell."""
        return self._count

    @property
    def description(self) -> str:
        """For reports, as in ``calibration.npz (100 samples)``."""
        if self._count is None:
            return self._name
        return f"{self._name} ({self._count} {self._unit}{'' if self._count == 1 else 's'})"

    def __len__(self) -> int:
        if self._count is None:
            raise TypeError(f"the length of {self._name} is known only after one complete pass")
        return self._count

    def __iter__(self) -> Iterator[Feeds]:
        if not self._finalizer.alive:
            raise DataError(f"{self._name} was closed; open it again")
        count = 0
        for feeds in self._replay():
            yield feeds
            count += 1
        if not count:
            raise DataError(f"{self._name} holds no samples; give at least one")
        self._count = count

    def close(self) -> None:
        """Remove temporary files; the data cannot be iterated any more."""
        self._finalizer()

    def __enter__(self) -> Data:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_data(
    source: object, inputs: Sequence[InputInfo], *, images: ImagePreprocessing | None = None, seed: int = 0
) -> Data:
    """Open a path (.npz, .npy, a folder), a dict of arrays, an iterable of feeds or "synthetic:N" for these inputs.

    ``images`` serves a folder of images only, ``seed`` synthetic samples only. An open Data is returned as it is.
    In a folder of .npy files, one of a rank less than the input's is one sample, if the input's axis 0 is 1 or free.
    Arrays in memory and single files are checked here as a whole; streams and folders here for their first feed (so
    one item of a generator is taken), then as they pass.

    Raises:
        DataError: the source is no data, or does not fit; shows what the model wants beside what was given.
    """
    data = _open(source, tuple(inputs), images, seed)
    next(iter(data))
    return data


def load_labels(source: object) -> np.ndarray | None:
    """The array ``labels`` of an .npz file or of a dict of arrays, as it is; None where the source has none.

    Raises:
        DataError: the file or the array is unreadable.
    """
    if isinstance(source, (str, os.PathLike)) and Path(source).suffix.lower() == ".npz":
        given: Mapping[str, object] = _load_npz(Path(source).expanduser(), lambda name: name == LABELS)
    else:
        given = source if isinstance(source, Mapping) else {}
    return as_array(given[LABELS], LABELS, "the data") if LABELS in given else None


def _open(source: object, inputs: Sequence[InputInfo], images: ImagePreprocessing | None, seed: int) -> Data:
    if isinstance(source, Data):
        return source
    if isinstance(source, str) and source.startswith("synthetic:"):
        return _open_synthetic(source, inputs, seed)
    if isinstance(source, (str, os.PathLike)):
        return _open_path(Path(source).expanduser(), inputs, images)
    if isinstance(source, np.ndarray):
        source = {only_input(inputs, "a single array").name: source}
    if isinstance(source, Mapping):
        samples = _Samples.of({k: v for k, v in source.items() if k != LABELS or is_input(k, inputs)}, inputs, "dict")
        return Data("arrays in memory", samples.__iter__, count=samples.count)
    if isinstance(source, (list, tuple)):
        feeds: Sequence[object] = source
        return Data("list of feeds", lambda: _whole_feeds(feeds, inputs), count=len(feeds), unit="feed")
    if callable(get_next := getattr(source, "get_next", None)):
        source = iter(get_next, None)
    if isinstance(source, Iterable):
        spool = Spool(_whole_feeds(source, inputs), inputs)
        return Data("stream of feeds", spool.__iter__, unit="feed", release=spool.close)
    given = "no data given" if source is None else f"a {type(source).__name__} is no data"
    raise DataError(f"{given}; give one of\n{_SOURCES}")


def _open_synthetic(source: str, inputs: Sequence[InputInfo], seed: int) -> Data:
    count = source.removeprefix("synthetic:")
    if not count.isdecimal() or int(count) == 0:
        raise DataError(f"{source!r}: write synthetic:N with the number of samples N, as in synthetic:16")
    if bad := [info.name for info in inputs if info.dtype.kind in "OSU"]:
        raise DataError(f"{source!r}: random samples cannot be made for the text input {bad[0]!r}; give real data")

    def replay() -> Iterator[Feeds]:
        for index in range(int(count)):
            rng = np.random.default_rng([seed, index])
            yield {info.name: _random(info, rng) for info in inputs}

    return Data("synthetic random samples", replay, count=int(count), synthetic=True)


def _random(info: InputInfo, rng: np.random.Generator) -> np.ndarray:
    shape = [dim if isinstance(dim, int) else 1 for dim in info.shape]
    if "int" in info.dtype.name or info.dtype.kind == "b":
        # 0 and 1 fit every integer type down to two bits, and are valid indices almost anywhere.
        return rng.integers(0, 2, shape).astype(info.dtype)
    return np.asarray(rng.standard_normal(shape)).astype(info.dtype)


def _open_path(path: Path, inputs: Sequence[InputInfo], images: ImagePreprocessing | None) -> Data:
    if not path.exists():
        raise DataError(f"{path} does not exist; check the path, or give one of\n{_SOURCES}")
    if path.is_dir():
        return _open_folder(path, inputs, images)
    if path.suffix.lower() not in (".npz", ".npy"):
        raise DataError(f"{path}: this kind of file is no data; give one of\n{_SOURCES}")
    samples = _load_samples(path, inputs)
    return Data(path.name, samples.__iter__, count=samples.count)


def _open_folder(folder: Path, inputs: Sequence[InputInfo], images: ImagePreprocessing | None) -> Data:
    title = folder.resolve().name  # a folder given as "." has no name before
    if sets := _test_data_sets(folder):
        return Data(title, lambda: (_load_set(one, inputs) for one in sets), count=len(sets), unit="feed")
    kind, files = _folder_kind(folder)
    if kind == "image":
        return Data(title, _images(folder, files, inputs, images), count=len(files), unit="image")
    if kind == ".npy":
        only_input(inputs, f"{folder}: a folder of .npy files")
    return Data(title, lambda: (feeds for path in files for feeds in _load_samples(path, inputs, lone=True)))


def _folder_kind(folder: Path) -> tuple[str, list[Path]]:
    """What all files of a folder are (".npz", ".npy" or "image"), and the files by name; hidden ones do not count."""
    from qdqtool.images import SUFFIXES

    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    kinds: dict[str, Path] = {}
    for path in reversed(files):
        suffix = "folder" if path.is_dir() else path.suffix.lower()
        kinds["image" if suffix in SUFFIXES else suffix] = path
    if not kinds:
        raise DataError(f"{folder} is empty; give a folder of .npz, .npy or image files")
    if len(kinds) > 1:
        found = ", ".join(path.name for path in kinds.values())
        raise DataError(
            f"{folder} mixes kinds of files ({found}); leave only .npz, only .npy or only image files in it"
        )
    (kind,) = kinds
    if kind not in (".npz", ".npy", "image"):
        raise DataError(f"{folder} holds no data ({files[0].name}); give one of\n{_SOURCES}")
    return kind, files


def _images(
    folder: Path, files: Sequence[Path], inputs: Sequence[InputInfo], images: ImagePreprocessing | None
) -> Callable[[], Iterator[Feeds]]:
    from qdqtool.images import EXAMPLE, read_image

    info = only_input(inputs, f"{folder}: a folder of images")
    if images is None:
        raise DataError(f"{folder}: say how images become the model's input; a recipe has, for example,\n\n{EXAMPLE}")

    def replay() -> Iterator[Feeds]:
        for path in files:
            pixels = {info.name: read_image(path, images, info.dtype)}
            yield fit(pixels, inputs, f"{path} after [images]", row_shapes)

    return replay


def _test_data_sets(folder: Path) -> list[Path]:
    """The folders with input_*.pb files below this one, in the order of their numbers, or this folder itself."""
    sets = [path for path in folder.glob("test_data_set_*") if path.is_dir()]
    sets.sort(key=lambda path: (len(path.name), path.name))
    return sets or ([folder] if any(folder.glob("input_*.pb")) else [])


def _load_set(folder: Path, inputs: Sequence[InputInfo]) -> Feeds:
    """The feed in input_0.pb, input_1.pb ...: by the name in the file where the model has it, else by the number."""
    from onnx import load_tensor, numpy_helper

    feed: Feeds = {}
    for path in sorted(folder.glob("input_*.pb")):
        try:
            tensor = load_tensor(str(path))
            array = numpy_helper.to_array(tensor, str(folder))
        except Exception as error:  # protobuf, onnx and numpy raise a dozen unrelated kinds here
            raise DataError(f"{path} is no readable ONNX tensor ({error}); write it again") from error
        name, number = tensor.name, path.stem.removeprefix("input_")
        if not is_input(name, inputs):
            if not number.isdecimal() or int(number) >= len(inputs):
                raise DataError(
                    f"{path}: the model has {len(inputs)} input(s) and none named {name!r}; remove the file"
                )
            name = inputs[int(number)].name
        if name in feed:
            raise DataError(f"{path}: another file of this folder is for input {name!r} too; remove one of them")
        feed[name] = array
    return fit(feed, inputs, str(folder), whole_shapes)


def _load_samples(path: Path, inputs: Sequence[InputInfo], *, lone: bool = False) -> _Samples:
    """The samples of an .npz or .npy file; ``lone``: an .npy may be one sample without the model's batch axis."""
    if path.suffix.lower() == ".npz":
        return _Samples.of(_load_npz(path, lambda name: name != LABELS or is_input(name, inputs)), inputs, str(path))
    info = only_input(inputs, f"{path}: an .npy file")
    array = _load_npy(path)
    if lone and array.ndim == len(info.shape) - 1 and (info.shape[0] == 1 or not isinstance(info.shape[0], int)):
        array = array[np.newaxis]
    return _Samples.of({info.name: array}, inputs, str(path))


def _load_npz(path: Path, wanted: Callable[[str], bool]) -> Feeds:
    # Opened here, since numpy.load leaves a damaged file open.
    with _reading(path), path.open("rb") as file:
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise DataError(f"{path} holds one array without a name; write it with numpy.savez, or name it .npy")
        with loaded:
            return {name: loaded[name] for name in loaded.files if wanted(name)}


def _load_npy(path: Path) -> np.ndarray:
    """The array of an .npy file, left on disk until its rows are read."""
    with _reading(path):
        return np.lib.format.open_memmap(path, mode="r")


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (DataError, MemoryError):
        raise
    except Exception as error:  # numpy, zipfile and the tokenizer of headers raise a dozen unrelated kinds here
        if "Object arrays" in str(error) or "Python objects" in str(error):
            raise DataError(f"{path} holds Python objects; save plain arrays of numbers") from error
        kind = type(error).__name__
        raise DataError(f"{path} is no readable .npz or .npy file ({kind}); write it again with numpy.savez") from error


@dataclass(frozen=True)
class _Samples:
    """Arrays of ``count`` samples each; those in ``items`` have one rank more than the model's input."""

    arrays: Feeds
    items: frozenset[str]
    count: int

    @classmethod
    def of(cls, given: Mapping[str, object], inputs: Sequence[InputInfo], where: str) -> _Samples:
        arrays = fit(given, inputs, where, sample_shapes)
        counts = {name: len(array) for name, array in arrays.items()}
        if len(set(counts.values())) > 1:
            found = ", ".join(f"{name} has {count}" for name, count in counts.items())
            raise DataError(
                f"{where}: the inputs differ in their number of samples, axis 0 ({found}); give equally many, and "
                "where axis 0 is no batch give one rank more, each item a whole feed"
            )
        items = frozenset(info.name for info in inputs if arrays[info.name].ndim > len(info.shape))
        return cls(arrays, items, max(counts.values(), default=0))

    def __iter__(self) -> Iterator[Feeds]:
        for i in range(self.count):
            yield {name: a[i, ...] if name in self.items else a[i : i + 1] for name, a in self.arrays.items()}


def _whole_feeds(source: Iterable[object], inputs: Sequence[InputInfo]) -> Iterator[Feeds]:
    for index, feed in enumerate(source):
        where = f"feed {index} (the first is 0)"
        if not isinstance(feed, Mapping):
            raise DataError(f"{where} is a {type(feed).__name__}; each must be a dict {{input name: array}}")
        yield fit(feed, inputs, where, whole_shapes)
