"""Feeds in folders of input_*.pb files, one folder a feed, as ONNX keeps test data beside a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qdqtool.data.fit import Feeds, fit, is_input, whole_shapes
from qdqtool.errors import DataError

if TYPE_CHECKING:
    from qdqtool.graphs.model import InputInfo


def find_sets(folder: Path) -> list[Path]:
    """The folders with input_*.pb files below this one, in the order of their numbers, or this folder itself."""
    sets = [path for path in folder.glob("test_data_set_*") if path.is_dir()]
    sets.sort(key=lambda path: (len(path.name), path.name))
    return sets or ([folder] if any(folder.glob("input_*.pb")) else [])


def load_set(folder: Path, inputs: Sequence[InputInfo]) -> Feeds:
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
