import gc
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from qdqtool.data.fit import Feeds
from qdqtool.data.source import Data, load_labels, open_data
from qdqtool.errors import DataError
from qdqtool.graphs.model import InputInfo


def info(name: str, dtype: Any, *shape: int | str | None) -> InputInfo:
    return InputInfo(name, np.dtype(dtype), shape)


def ramp(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


X = info("x", np.float32, "N", 3)
IDS = info("ids", np.int64, "N", None)
STATE = info("state", np.float32, 2, 1, 4)


def same(left: Feeds, right: Feeds) -> bool:
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and left[k].shape == right[k].shape and left[k].tobytes() == right[k].tobytes()
        for k in left
    )


def assert_replays(data: Data, count: int) -> list[Feeds]:
    first, second = list(data), list(data)
    assert len(first) == len(second) == len(data) == data.count == count
    assert all(map(same, first, second))
    assert all(array.flags.c_contiguous for feeds in first for array in feeds.values())
    return first


# Arrays: samples along axis 0, or whole feeds with one rank more


def test_dict_gives_one_row_of_every_input_and_copies_nothing() -> None:
    x, ids = ramp(4, 3), ramp(4, 5, dtype=np.int64)
    data = open_data({"ids": ids, "x": x, "labels": np.zeros(4)}, [X, IDS])
    feeds = assert_replays(data, 4)
    assert list(feeds[2]) == ["x", "ids"]
    np.testing.assert_array_equal(feeds[2]["x"], x[2:3])
    assert np.shares_memory(feeds[2]["ids"], ids)
    assert not feeds[2]["x"].flags.writeable
    assert x.flags.writeable
    assert data.description == "arrays in memory (4 samples)"
    assert not data.synthetic


def test_one_rank_more_gives_whole_feeds() -> None:
    states, x = ramp(5, 2, 1, 4), ramp(5, 3)
    feeds = assert_replays(open_data({"state": states, "x": x}, [STATE, X]), 5)
    np.testing.assert_array_equal(feeds[1]["state"], states[1])
    np.testing.assert_array_equal(feeds[1]["x"], x[1:2])


def test_scalar_inputs_take_one_number_a_feed() -> None:
    feeds = assert_replays(open_data({"t": ramp(3)}, [info("t", np.float32)]), 3)
    assert [(f["t"].shape, f["t"].item()) for f in feeds] == [((), 0.0), ((), 1.0), ((), 2.0)]


def test_a_fixed_batch_is_fed_row_by_row() -> None:
    assert assert_replays(open_data({"x": ramp(5, 3)}, [info("x", np.float32, 8, 3)]), 5)[0]["x"].shape == (1, 3)


def test_other_memory_orders_become_contiguous() -> None:
    x = np.asfortranarray(ramp(4, 3))
    np.testing.assert_array_equal(assert_replays(open_data({"x": x}, [X]), 4)[3]["x"], x[3:])


def test_npz_and_npy_files_are_like_arrays_in_memory(tmp_path: Path) -> None:
    x, ids = ramp(4, 3), ramp(4, 2, dtype=np.int64)
    np.savez(tmp_path / "calib.npz", x=x, ids=ids, labels=ramp(4))
    np.save(tmp_path / "x.npy", x)
    data = open_data(str(tmp_path / "calib.npz"), [X, IDS])
    assert data.description == "calib.npz (4 samples)"
    assert all(map(same, assert_replays(data, 4), open_data({"x": x, "ids": ids}, [X, IDS])))
    for source in (tmp_path / "x.npy", x, np.load(tmp_path / "x.npy", mmap_mode="r")):
        assert all(map(same, assert_replays(open_data(source, [X]), 4), open_data({"x": x}, [X])))


def test_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "eval.npz", x=ramp(4, 3), labels=[1, 0, 2, 1])
    np.savez(tmp_path / "calib.npz", x=ramp(4, 3))
    for source in (tmp_path / "eval.npz", str(tmp_path / "eval.npz"), {"labels": [1, 0, 2, 1]}):
        labels = load_labels(source)
        assert labels is not None
        assert labels.tolist() == [1, 0, 2, 1]
    assert load_labels(tmp_path / "calib.npz") is load_labels({"x": ramp(4, 3)}) is load_labels("synthetic:3") is None
    with pytest.raises(DataError, match=r"gone\.npz"):
        load_labels(tmp_path / "gone.npz")


def test_an_input_may_be_called_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", labels=ramp(2, 3))
    wanted = [info("labels", np.float32, "N", 3)]
    for source in (tmp_path / "a.npz", tmp_path, {"labels": ramp(2, 3)}):
        assert next(iter(open_data(source, wanted)))["labels"].shape == (1, 3)


# Element types


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (np.float64, np.float32),
        (np.float64, np.float16),
        (np.float32, np.float64),
        (">f4", np.float32),
        (np.int32, np.int64),
        (np.int64, np.uint8),
        (np.bool_, np.bool_),
        (ml_dtypes.bfloat16, ml_dtypes.bfloat16),
        (ml_dtypes.float8_e5m2, ml_dtypes.float8_e5m2),
        (ml_dtypes.int4, ml_dtypes.int4),
    ],
)
def test_a_type_that_loses_nothing_of_meaning_is_converted(given: Any, wanted: Any) -> None:
    values = np.array([[0, 1, 1]])
    for source in ({"x": values.astype(given)}, iter([{"x": values.astype(given)}])):
        (feeds,) = assert_replays(open_data(source, [info("x", wanted, "N", 3)]), 1)
        assert feeds["x"].dtype == wanted
        np.testing.assert_array_equal(feeds["x"].astype(np.int64), values)


@pytest.mark.parametrize(
    ("given", "wanted", "message"),
    [
        (np.array([[1, 2, 3]]), np.float32, "not guessed"),
        (np.array([[1, 2, 3]], np.uint8), np.float16, r"astype\('float16'\) / 255"),
        (np.array([[1.0, 2, 3]]), np.int64, "not converted to int64"),
        (np.array([[1, 2, 300]]), np.uint8, "values 1 to 300 do not fit uint8"),
        (np.array([[-1, 2, 3]]), np.uint64, "values -1 to 3 do not fit uint64"),
        (np.array([[1, 2, 3e38]]), np.float16, "too large for float16"),
        (np.array([[1, 0, 1]]), np.bool_, "not converted to bool"),
        (np.array([[True, False, True]]), np.int64, "not converted to int64"),
        (np.array([[1, 2, 3]], np.float32), ml_dtypes.bfloat16, "not converted to bfloat16"),
        (np.array([["a", "b", "c"]]), np.float32, "not converted to float32"),
        (np.array([[1, None, 3]]), np.float32, "holds Python objects"),
        ([[1.0, 2.0], [3.0]], np.float32, "cannot become a numpy array"),
    ],
)
def test_any_other_type_is_refused(given: Any, wanted: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data({"x": given}, [info("x", wanted, "N", None)])


def test_infinities_and_nan_pass() -> None:
    values = np.array([[np.inf, -np.inf, np.nan]])
    np.testing.assert_array_equal(next(iter(open_data({"x": values}, [X])))["x"], values)


def test_bfloat16_survives_an_npy_file(tmp_path: Path) -> None:
    x = ramp(2, 3, dtype=ml_dtypes.bfloat16)
    np.save(tmp_path / "x.npy", x)
    (_, second) = open_data(tmp_path / "x.npy", [info("x", ml_dtypes.bfloat16, "N", 3)])
    assert second["x"].dtype == ml_dtypes.bfloat16
    assert second["x"].tolist() == x[1:].tolist()


# What does not fit


def test_the_error_shows_what_is_wanted_beside_what_is_given() -> None:
    with pytest.raises(DataError) as caught:
        open_data({"x": ramp(4, 5), "idx": ramp(4, 5, dtype=np.int64)}, [X, IDS])
    assert str(caught.value).splitlines() == [
        "dict does not fit the model",
        "  the model wants    given",
        "  x: float32[N, 3]   x: float32[4, 5]",
        "  ids: int64[N, ?]   -",
        "  -                  idx: int64[4, 5]",
        "",
        "x: axis 1 must be 3, not 5",
        "ids: missing; every input of the model needs an array",
        "idx: the model has no such input; remove or rename it. Did you mean 'ids'?",
    ]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"x": ramp(4)}, "its rank is 1; give rank 2 or 3"),
        ({"x": ramp(1, 1, 4, 3)}, "its rank is 4; give rank 2 or 3"),
        ({"x": ramp(2, 4, 5)}, "axis 2 must be 3, not 5"),
        ({"x": ramp(0, 3)}, "holds no samples"),
        ({}, "x: missing"),
        ([], "list of feeds holds no samples"),
        (iter(()), "stream of feeds holds no samples"),
        ([{"x": ramp(3)}], r"give array\[numpy.newaxis\]"),
        ([{"x": ramp(1, 1, 3)}], "its rank is 3; give rank 2$"),
        ([{"x": ramp(1, 3), "labels": ramp(1)}], "labels: the model has no such input"),
        ([ramp(1, 3)], "feed 0 .* is a ndarray; each must be a dict"),
        (None, "no data given; give one of"),
        (None, "synthetic:N.*only for trying things out"),
        (3, "a int is no data"),
        ("synthetic:", "number of samples"),
        ("synthetic:0", "number of samples"),
        ("synthetic:many", "number of samples"),
        ("no/such/file.npz", "file.npz does not exist"),
    ],
)
def test_what_is_no_data_or_does_not_fit_is_refused(source: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data(source, [X])


def test_inputs_must_agree_on_the_number_of_samples() -> None:
    with pytest.raises(DataError, match=r"x has 4, ids has 5.*one rank more"):
        open_data({"x": ramp(4, 3), "ids": ramp(5, 3, dtype=np.int64)}, [X, IDS])


def test_one_array_needs_a_model_of_one_input(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", ramp(4, 3))
    for source in (tmp_path / "x.npy", tmp_path, ramp(4, 3)):
        with pytest.raises(DataError, match=r"models of one input, this one has 2 \(x, ids\)"):
            open_data(source, [X, IDS])


def test_text_inputs_have_no_synthetic_samples() -> None:
    with pytest.raises(DataError, match="text input 'words'"):
        open_data("synthetic:1", [info("words", object, 1)])


WORDS = [["a", "longer"], ["text", ""]]


def test_text_is_taken_as_objects_or_as_numpys_own_type(tmp_path: Path) -> None:
    inputs = [info("words", object, "N", 2)]
    np.savez(tmp_path / "words.npz", words=np.array(WORDS))
    sources: list[Any] = [
        {"words": np.array(WORDS, object)},
        {"words": WORDS},
        [{"words": np.array(WORDS[:1], object)}, {"words": np.array(WORDS[1:])}],
        iter([{"words": np.array(WORDS[:1], object)}, {"words": np.array(WORDS[1:])}]),
        tmp_path / "words.npz",
    ]
    for source in sources:
        with open_data(source, inputs) as data:
            for _ in range(2):
                assert [feed["words"].tolist() for feed in data] == [WORDS[:1], WORDS[1:]]


def test_numbers_are_no_text_and_text_is_no_number() -> None:
    with pytest.raises(DataError, match="float32 is not converted to object"):
        open_data({"words": ramp(2, 2)}, [info("words", object, "N", 2)])
    with pytest.raises(DataError, match="is not converted to float32"):
        open_data({"x": WORDS}, [info("x", np.float32, "N", 2)])


def test_an_input_of_any_rank_takes_whole_feeds() -> None:
    unranked = InputInfo("x", np.dtype(np.float32), (), ranked=False)
    assert str(unranked) == "x: float32[...]"
    found = assert_replays(open_data([{"x": ramp(2, 3)}, {"x": ramp(4)}], [unranked]), 2)
    assert [feed["x"].shape for feed in found] == [(2, 3), (4,)]
    with pytest.raises(DataError, match="leaves its rank open; give a list of whole feeds"):
        open_data({"x": ramp(2, 3)}, [unranked])


def npy_bytes(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz_bytes(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]  # its stub takes the flag allow_pickle for one of the arrays
    return file.getvalue()


def damaged_npz() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x.npy", npy_bytes(ramp(4, 3))[:-8])
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npz", b"", "no readable"),
        ("a.npz", b"some text", "no readable"),
        ("a.npz", npz_bytes(x=ramp(4, 3))[:100], "no readable"),
        ("a.npz", damaged_npz(), "no readable"),
        ("a.npz", npy_bytes(ramp(4, 3)), "one array without a name"),
        ("a.npz", npz_bytes(x=np.array([None])), "holds Python objects"),
        ("a.npy", b"", "no readable"),
        ("a.npy", b"some text", "no readable"),
        ("a.npy", npy_bytes(ramp(4, 3))[:-4], "no readable"),
        ("a.npy", npy_bytes(np.array([None])), "holds Python objects"),
        ("a.npy", npz_bytes(x=ramp(4, 3)), "no readable"),
        ("a.csv", b"1,2,3", "no data"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}.*{message}"):
        open_data(tmp_path / name, [X])
    with pytest.raises(DataError, match=rf"{name}.*{message}|{message}.*{name}"):
        open_data(tmp_path, [X])


# Folders


def test_a_folder_of_npz_files_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / ".hidden").touch()
    np.savez(tmp_path / "b.npz", x=ramp(1, 3), ids=ramp(1, 7, dtype=np.int64))
    np.savez(tmp_path / "a.npz", x=ramp(2, 3), ids=ramp(2, 5, dtype=np.int64))
    data = open_data(tmp_path, [X, IDS])
    assert data.count is None
    assert data.description == tmp_path.name
    with pytest.raises(TypeError, match="one complete pass"):
        len(data)
    list(data)
    assert [feeds["ids"].shape for feeds in assert_replays(data, 3)] == [(1, 5), (1, 5), (1, 7)]
    assert data.description == f"{tmp_path.name} (3 samples)"


def test_the_current_folder_has_a_name_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "a.npz", x=ramp(1, 3))
    monkeypatch.chdir(tmp_path)
    assert open_data(".", [X]).description == tmp_path.name


def test_a_folder_of_npy_files_holds_batches_or_single_samples(tmp_path: Path) -> None:
    for name, array in {"a": ramp(2, 3), "b": ramp(3), "c": ramp(1, 1, 3)}.items():
        np.save(tmp_path / f"{name}.npy", array)
    feeds = list(open_data(tmp_path, [X]))
    assert [f["x"].shape for f in feeds] == [(1, 3)] * 4
    assert feeds[2]["x"].tolist() == [[0, 1, 2]]
    with pytest.raises(DataError, match=r"b\.npy does not fit"):
        list(open_data(tmp_path, [info("x", np.float32, 8, 3)]))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "is empty"),
        ([".hidden"], "is empty"),
        (["a.npz", "b.npy"], r"mixes kinds of files \(.*a\.npz"),
        (["a.npz", "notes.txt"], r"mixes kinds of files \(.*notes\.txt"),
        (["notes.txt"], r"holds no data \(notes\.txt\)"),
        (["train/", "val/"], r"holds no data \(train\)"),
    ],
)
def test_a_folder_of_something_else_is_refused(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    with pytest.raises(DataError, match=message):
        open_data(tmp_path, [X])


def save_pb(path: Path, array: np.ndarray, name: str = "") -> None:
    path.parent.mkdir(exist_ok=True)
    onnx.save_tensor(numpy_helper.from_array(array, name), str(path))


def test_onnx_test_data_sets(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    for i in (0, 2, 10):
        save_pb(tmp_path / f"test_data_set_{i}/input_0.pb", ramp(2, i + 1, dtype=np.int64), "ids")
        save_pb(tmp_path / f"test_data_set_{i}/input_1.pb", ramp(4, 3), "some other name")
        save_pb(tmp_path / f"test_data_set_{i}/output_0.pb", ramp(1))
    data = open_data(tmp_path, [IDS, X])
    assert [feeds["ids"].shape for feeds in assert_replays(data, 3)] == [(2, 1), (2, 3), (2, 11)]
    (alone,) = open_data(tmp_path / "test_data_set_2", [IDS, X])
    np.testing.assert_array_equal(alone["x"], ramp(4, 3))


def test_the_name_in_a_pb_file_wins_over_its_number(tmp_path: Path) -> None:
    save_pb(tmp_path / "set/input_0.pb", ramp(1, 3), "x")
    save_pb(tmp_path / "set/input_1.pb", ramp(1, 3, dtype=np.int64), "ids")
    (feeds,) = open_data(tmp_path / "set", [IDS, X])
    assert feeds["x"].dtype == np.float32


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"input_0": ramp(1, 3), "input_2": ramp(1, 3)}, r"input_2\.pb: the model has 2 input"),
        ({"input_x": ramp(1, 3)}, r"input_x\.pb: the model has 2 input"),
        ({"input_0": ramp(1, 3)}, "ids: missing"),
        ({"input_0": ramp(1, 3), "input_00": ramp(1, 3)}, "another file of this folder is for input 'x'"),
        ({"input_0": ramp(3), "input_1": ramp(1, 3, dtype=np.int64)}, "x: the leading batch axis is missing"),
        ({"input_0": np.array([["a"] * 3], object)}, "is not converted to float32"),
    ],
)
def test_bad_test_data_sets(tmp_path: Path, files: dict[str, np.ndarray], message: str) -> None:
    for name, array in files.items():
        save_pb(tmp_path / f"{name}.pb", array)
    with pytest.raises(DataError, match=message):
        open_data(tmp_path, [X, IDS])


@pytest.mark.parametrize("content", [b"", b"some text"])
def test_a_bad_pb_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "input_0.pb").write_bytes(content)
    with pytest.raises(DataError, match=r"input_0\.pb is no readable ONNX tensor"):
        open_data(tmp_path, [X])


# Streams


class Counter:
    """Feeds of growing length, counting how many were pulled."""

    def __init__(self, count: int) -> None:
        self.pulled, self.count = 0, count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while self.pulled < self.count:
            self.pulled += 1
            yield {"x": ramp(1, 3) + self.pulled, "ids": ramp(1, self.pulled, dtype=np.int32)}


def test_a_generator_is_spooled_as_it_passes() -> None:
    source = Counter(5)
    with open_data(source, [X, IDS]) as data:
        assert data.count is None
        passing = iter(data)
        first = [next(passing), next(passing)]
        assert source.pulled == 2
        everything = list(data)
        assert [f["ids"].shape for f in everything] == [(1, i) for i in range(1, 6)]
        assert all(map(same, everything, [*first, *passing]))
        assert_replays(data, 5)
        assert source.pulled == 5
        assert data.description == "stream of feeds (5 feeds)"


def test_a_generator_may_reuse_its_buffer() -> None:
    buffer = ramp(1, 3)

    def source() -> Iterator[dict[str, np.ndarray]]:
        for i in range(3):
            buffer[:] = i
            yield {"x": buffer}

    assert [f["x"].max() for f in list(open_data(source(), [X]))] == [0, 1, 2]


def test_scalars_and_empty_tensors_pass_through_the_spool() -> None:
    inputs = [info("t", np.float32), info("past", np.float16, "N", "P", 4)]
    (feeds,) = assert_replays(open_data(iter([{"t": 0.5, "past": np.zeros((1, 0, 4))}]), inputs), 1)
    assert feeds["t"].shape == ()
    assert feeds["t"].item() == 0.5
    assert feeds["past"].shape == (1, 0, 4)


def test_a_calibration_data_reader_is_one_shot() -> None:
    class Reader:
        def __init__(self) -> None:
            self.left = [{"x": ramp(1, 3)}, {"x": ramp(2, 3)}]

        def get_next(self) -> dict[str, np.ndarray] | None:
            return self.left.pop() if self.left else None

    data = open_data(Reader(), [X])
    list(data)
    assert [f["x"].shape for f in assert_replays(data, 2)] == [(2, 3), (1, 3)]


def test_a_list_is_replayed_without_a_spool_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.TemporaryFile", None)
    data = open_data([{"x": [[1.0, 2.0, 3.0]]}, {"x": ramp(4, 3)}], [X])
    assert [f["x"].shape for f in assert_replays(data, 2)] == [(1, 3), (4, 3)]


def test_a_generator_that_failed_is_not_taken_for_a_complete_one() -> None:
    def source() -> Iterator[dict[str, np.ndarray]]:
        yield {"x": ramp(1, 3)}
        raise RuntimeError("disk on fire")

    data = open_data(source(), [X])
    with pytest.raises(RuntimeError, match="disk on fire"):
        list(data)
    with pytest.raises(DataError, match=r"failed on an earlier pass.*disk on fire"):
        list(data)


def test_a_feed_that_does_not_fit_is_named_by_number() -> None:
    source = [{"x": ramp(1, 3)}, {"x": ramp(1, 4)}]
    for data in (open_data(source, [X]), open_data(iter(source), [X])):
        for _ in range(2):
            with pytest.raises(DataError, match="feed 1 "):
                list(data)


def test_closing_removes_the_spool() -> None:
    data = open_data(iter([{"x": ramp(1, 3)}]), [X])
    data.close()
    data.close()
    with pytest.raises(DataError, match="was closed"):
        list(data)


def test_a_forgotten_stream_closes_its_file() -> None:
    # pytest turns the ResourceWarning of a file that nobody closed into an error.
    data = open_data(iter([{"x": ramp(1, 3)}]), [X])
    del data
    gc.collect()


def test_open_data_is_passed_on() -> None:
    data = open_data("synthetic:2", [X])
    assert open_data(data, [X]) is data


# Synthetic samples


def test_synthetic_samples_follow_shapes_types_and_seed() -> None:
    inputs = [X, IDS, STATE, info("flag", np.bool_), info("q", np.uint8, 2), info("b", ml_dtypes.bfloat16, 2)]
    data = open_data("synthetic:3", inputs)
    feeds = assert_replays(data, 3)
    assert data.synthetic
    assert data.description == "synthetic random samples (3 samples)"
    assert {name: (a.dtype, a.shape) for name, a in feeds[0].items()} == {
        "x": (np.float32, (1, 3)),
        "ids": (np.int64, (1, 1)),
        "state": (np.float32, (2, 1, 4)),
        "flag": (np.bool_, ()),
        "q": (np.uint8, (2,)),
        "b": (ml_dtypes.bfloat16, (2,)),
    }
    assert not same(feeds[0], feeds[1])
    assert not same(feeds[0], next(iter(open_data("synthetic:3", inputs, seed=1))))
