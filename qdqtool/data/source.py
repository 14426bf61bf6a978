"""Whatever a user calls data -> a replayable stream of feeds that fit the model.

Arrays (.npz, .npy, a dict) hold samples: of the model input's rank, along axis 0, and every feed is one row [i:i+1];
of one rank more, every item [i] is one whole feed. Dicts from an iterable and .pb files are whole feeds.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qdqtool.data.arrays import open_npz
from qdqtool.data.fit import Feeds, as_array, fit, is_input, only_input, row_shapes, whole_shapes
from qdqtool.data.pb import find_sets, load_set
from qdqtool.data.rows import LABELS, Samples, open_samples
from qdqtool.data.spool import Spool
from qdqtool.errors import DataError

if TYPE_CHECKING:
    from qdqtool.data.images import ImagePreprocessing
    from qdqtool.graphs.model import InputInfo

_SOURCES = """\
  data.npz, or a dict of arrays   named as the model's inputs, samples along axis 0
  data.npy                        the same, for a model of one input
  a folder                        of .npz, .npy or image files, or with test_data_set_*/input_*.pb
  an iterable of dicts            each a feed {input name: array}; or an object with get_next()
  "synthetic:N"                   N random samples, only for trying things out: their ranges mean nothing"""


class Data:
    """A replayable stream of feeds; iterating again gives the same feeds in the same order.

    A feed maps every model input to one C-contiguous array of the input's rank and dtype. An array may be a read-only
    view of the user's own. Files are read again at every pass, one sample at a time, so that memory does not grow with
    them; they must stay as they are meanwhile.

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
        self._check_open()
        count = 0
        for feeds in self._replay():
            yield feeds
            self._check_open()
            count += 1
        if not count:
            raise DataError(f"{self._name} holds no samples; give at least one")
        self._count = count

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise DataError(f"{self._name} was closed; open it again")

    def close(self) -> None:
        """Close files and remove temporary ones; the data cannot be iterated any more, feeds taken stay valid."""
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
    Arrays in memory and single files are checked here as a whole, a part at a time; streams and folders here for their
    first feed (so one item of a generator is taken), then as they pass. Values are converted as they pass, too.

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
        with contextlib.ExitStack() as stack:
            found = open_npz(Path(source).expanduser(), lambda name: name == LABELS, stack)
            return found[LABELS].read() if LABELS in found else None
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
        samples = Samples.of({k: v for k, v in source.items() if k != LABELS or is_input(k, inputs)}, inputs, "dict")
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
    with contextlib.ExitStack() as stack:
        samples = open_samples(path, inputs, stack)
        return Data(path.name, samples.__iter__, count=samples.count, release=stack.pop_all().close)


def _open_folder(folder: Path, inputs: Sequence[InputInfo], images: ImagePreprocessing | None) -> Data:
    title = folder.resolve().name  # a folder given as "." has no name before
    if sets := find_sets(folder):
        return Data(title, lambda: (load_set(one, inputs) for one in sets), count=len(sets), unit="feed")
    kind, files = _folder_kind(folder)
    if kind == "image":
        return Data(title, _images(folder, files, inputs, images), count=len(files), unit="image")
    if kind == ".npy":
        only_input(inputs, f"{folder}: a folder of .npy files")
    return Data(title, lambda: _shards(files, inputs))


def _shards(files: Sequence[Path], inputs: Sequence[InputInfo]) -> Iterator[Feeds]:
    for path in files:
        with contextlib.ExitStack() as stack:
            yield from open_samples(path, inputs, stack, lone=True)


def _folder_kind(folder: Path) -> tuple[str, list[Path]]:
    """What all files of a folder are (".npz", ".npy" or "image"), and the files by name; hidden ones do not count."""
    from qdqtool.data.images import SUFFIXES

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
    from qdqtool.data.images import EXAMPLE, read_image

    info = only_input(inputs, f"{folder}: a folder of images")
    if images is None:
        raise DataError(f"{folder}: say how images become the model's input; a recipe has, for example,\n\n{EXAMPLE}")

    def replay() -> Iterator[Feeds]:
        for path in files:
            pixels = {info.name: read_image(path, images, info.dtype)}
            yield fit(pixels, inputs, f"{path} after [images]", row_shapes)

    return replay


def _whole_feeds(source: Iterable[object], inputs: Sequence[InputInfo]) -> Iterator[Feeds]:
    for index, feed in enumerate(source):
        where = f"feed {index} (the first is 0)"
        if not isinstance(feed, Mapping):
            raise DataError(f"{where} is a {type(feed).__name__}; each must be a dict {{input name: array}}")
        yield fit(feed, inputs, where, whole_shapes)
