"""Work on Ray gives what it gives on this machine's threads, bit for bit, whatever is lost on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qdqtool.data.batching import Batch, Sample, digest
from qdqtool.errors import ModelError, RecipeError, RuntimeUnavailableError
from qdqtool.observation import engine_ray, engine_ray_task
from qdqtool.observation.engine import Engine, Local
from qdqtool.observation.engine_ray import Ray
from qdqtool.observation.observe import ObserveJob, with_outputs
from tests import toy_job
from tests.builders import Array, normal, parse
from tests.toy_job import NOTHING, WIDTH, Fail, Items, KillOnce, Summing, Wait, item, whole

ray = pytest.importorskip("ray", reason="Ray is not installed")
pytestmark = [
    pytest.mark.xdist_group("ray"),  # one process, so that Ray is started once
    pytest.mark.skipif(sys.platform == "win32", reason="processes are killed by signals"),
]

COUNT = 40
EXPECTED = whole(Local().run(Summing(), Items(COUNT)))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of one node with two processors, to which this process is connected."""
    from ray.cluster_utils import Cluster

    ray.cloudpickle.register_pickle_by_value(toy_job)  # workers need not find the tests
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    ray.init(made.address, log_to_driver=False, logging_level="error")
    yield made
    ray.shutdown()
    made.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(toy_job)


@pytest.fixture
def unconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were no connection; the one there is stays."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)


@pytest.mark.usefixtures("cluster")
class TestOnRay:
    def test_is_an_engine(self) -> None:
        engine: Engine = Ray()
        assert engine.threads == 1
        assert list(engine.run(Summing(), [item(3)])) == [toy_job.Sum(1, item(3))]

    @pytest.mark.parametrize(
        "engine",
        [Ray(), *(Ray(chunk_items=count) for count in (1, 3, COUNT, 1000)), Ray(chunk_items=1000, chunk_bytes=1)],
        ids=["adaptive", "1", "3", "all", "more than all", "by size"],
    )
    def test_sums_every_item_once_however_they_are_cut(self, engine: Ray) -> None:
        items = Items(COUNT)
        (found,) = engine.run(Summing(), items, taken=items.taken)
        assert found == EXPECTED
        assert items.each_once()
        assert found.total.flags.writeable  # memory of its own, not Ray's

    def test_findings_are_merged_in_tasks_and_brought_to_the_driver_now_and_then(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        brought = []

        def unpack(packed: Any, *, own: bool = False) -> Any:
            brought.append(engine_ray_task.unpack(packed, own=own))
            return brought[-1]

        monkeypatch.setattr(engine_ray, "unpack", unpack)
        assert whole(Ray(chunk_items=1).run(Summing(), Items(150))).count == 150
        assert sum(found.count for found in brought) == 150
        assert [found.count >= 64 for found in brought] in ([True, True, False], [True, True], [True, False])

    @pytest.mark.parametrize("chunk", [1, 4])
    def test_items_in_memory_are_bounded(self, chunk: int) -> None:
        items = Items(30 * chunk)
        list(Ray(chunk_items=chunk).run(Summing(Wait(0.01)), items, taken=items.taken))
        assert chunk < items.most <= (2 * 2 + 1) * chunk

    def test_full_chunks_are_sent_by_size(self) -> None:
        items = Items(30)
        list(Ray(chunk_items=1000, chunk_bytes=2 * 8 * WIDTH).run(Summing(Wait(0.01)), items, taken=items.taken))
        assert items.most <= (2 * 2 + 1) * 2

    def test_pause_cuts_the_whole_into_parts(self) -> None:
        items = Items(COUNT)

        def pause(seconds: float) -> bool:
            return seconds >= 0 and len(items.drawn) % 16 == 0

        parts = list(Ray(chunk_items=3).run(Summing(), items, taken=items.taken, pause=pause))
        assert [part.count for part in parts] == [16, 16, 8]
        assert whole(parts) == EXPECTED
        assert items.each_once()

    def test_without_items_there_is_one_result_of_nothing(self) -> None:
        assert list(Ray().run(Summing(), [])) == [NOTHING]

    def test_a_worker_starts_once_a_process_and_run(self, tmp_path: Path) -> None:
        job = Summing(starts=tmp_path / "starts")
        parts = list(Ray(chunk_items=1).run(job, Items(COUNT), pause=lambda seconds: True))
        assert whole(parts) == EXPECTED
        processes = (tmp_path / "starts").read_text().split()
        assert 1 <= len(processes) == len(set(processes)) < COUNT // 4
        other = Summing(lambda number: toy_job.append(tmp_path / "numbers", number))
        assert whole(Ray().run(other, Items(COUNT))) == EXPECTED
        assert sorted(map(int, (tmp_path / "numbers").read_text().split())) == list(range(COUNT))


@pytest.mark.usefixtures("cluster")
class TestFailures:
    def test_an_exception_of_the_job_is_raised_as_it_was_and_not_tried_again(self, tmp_path: Path) -> None:
        items = Items(10_000)
        job = Summing(Fail(7, lambda: ModelError("node 'conv' is broken"), tmp_path / "attempts"))
        with pytest.raises(ModelError) as raised:
            list(Ray(chunk_items=2).run(job, items, taken=items.taken))
        assert type(raised.value) is ModelError
        assert str(raised.value) == "node 'conv' is broken"
        assert "toy_job.py" in raised.value.__notes__[0]
        assert (tmp_path / "attempts").read_text() == "7\n"
        assert len(items.drawn) < 100
        assert 7 not in {int(done[0]) for done in items.done}

    def test_an_exception_that_cannot_travel_is_told_in_words(self, tmp_path: Path) -> None:
        job = Summing(Fail(7, lambda: toy_job.Untransportable("code", 7), tmp_path / "attempts"))
        with pytest.raises(RuntimeError, match="Untransportable: code 7"):
            list(Ray().run(job, Items(COUNT)))

    def test_a_failure_of_the_data_ends_the_run(self) -> None:
        def data() -> Iterator[toy_job.Numbers]:
            yield item(0)
            raise OSError("disk")

        with pytest.raises(OSError, match="disk"):
            list(Ray().run(Summing(), data()))

    def test_a_killed_process_changes_nothing(self, tmp_path: Path) -> None:
        items = Items(COUNT)
        (found,) = Ray(chunk_items=2).run(Summing(KillOnce(21, tmp_path / "killed")), items, taken=items.taken)
        assert (tmp_path / "killed").exists()
        assert found == EXPECTED
        assert items.each_once()

    def test_a_process_killed_too_often_is_an_error(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(engine_ray, "_RETRIES", 0)
        with pytest.raises(RuntimeUnavailableError, match=r"Ray gave up: .*worker died.*fewer processors"):
            list(Ray().run(Summing(KillOnce(21, tmp_path / "killed")), Items(COUNT)))

    def test_a_lost_machine_changes_nothing(
        self, cluster: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(engine_ray, "_TOGETHER", COUNT)  # what was found stays where it was until all is done
        lost = cluster.add_node(num_cpus=2)
        items = Items(15)
        places = tmp_path / "places"
        again: set[int] = set()

        def on(there: bool) -> set[int]:
            lines = [line.split() for line in places.read_text().splitlines()]
            return {int(number) for node, number in lines if (node == lost.node_id) is there}

        def taken(item: toy_job.Numbers) -> None:
            items.taken(item)
            found_there = on(True).intersection(int(done[0]) for done in items.done)
            if not again and len(found_there) >= 4:
                again.update(found_there)  # as what was found is nowhere else
                cluster.remove_node(lost)

        (found,) = Ray(chunk_items=1).run(Summing(toy_job.Await(lost.node_id, places)), items, taken=taken)
        assert found == whole(Local().run(Summing(), Items(15)))
        assert items.each_once()
        assert again
        assert again.issubset(on(False))

    def test_other_versions_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        here = engine_ray_task.versions()
        monkeypatch.setattr(engine_ray, "versions", lambda: here | {"onnxruntime": "1.0"})
        with pytest.raises(RuntimeUnavailableError, match=rf"onnxruntime {here['onnxruntime']} but 1\.0 started"):
            list(Ray().run(Summing(), Items(COUNT)))


class TestWithoutRay:
    def test_options_that_contradict_are_refused(self) -> None:
        with pytest.raises(RecipeError, match="leave out address or cpus"):
            Ray("auto", cpus=2)
        with pytest.raises(RecipeError, match="chunk_items of the Ray engine is 0"):
            Ray(chunk_items=0)

    def test_missing_ray_names_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "ray", None)
        with pytest.raises(RuntimeUnavailableError, match=r"pip install qdqtool\[ray\]"):
            list(Ray().run(Summing(), [item(0)]))
        assert "RAY_DEDUP_LOGS_SKIP_REGEX" not in os.environ

    @pytest.mark.usefixtures("unconnected")
    @pytest.mark.parametrize("address", ["127.0.0.1:1", "auto"])
    def test_a_cluster_that_does_not_answer_is_named(self, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
        with pytest.raises(RuntimeUnavailableError, match=f"at '{address}' cannot be used: .*refused.*ray start"):
            list(Ray(address).run(Summing(), [item(0)]))

    @pytest.mark.usefixtures("unconnected")
    def test_a_cluster_of_another_version_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def init(*args: object, **kwargs: object) -> None:
            raise RuntimeError("Version mismatch: The cluster was started with: Ray: 2.0.0")

        monkeypatch.setattr(ray, "init", init)
        with pytest.raises(RuntimeUnavailableError, match=r"'auto' cannot be used: Version mismatch.*2\.0\.0; give"):
            list(Ray("auto").run(Summing(), [item(0)]))


def test_a_ray_of_its_own_is_quiet_and_ends_with_the_run_or_an_interrupt(tmp_path: Path) -> None:
    code = f"""
import os, pathlib, signal, sys
from qdqtool.observation.engine_ray import Ray
from tests.toy_job import Items, KillOnce, Summing, Wait

signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background may ignore interrupts

class Before:
    def __call__(self, number):
        KillOnce(21, folder / "killed")(number)
        if number == {COUNT}:
            (folder / "waiting").touch()
            Wait(600)(number)

folder = pathlib.Path(sys.argv[1])
items = Items(1000)
parts = Ray(cpus=1).run(
    Summing(Before(), folder / "starts"), items, pause=lambda seconds: len(items.drawn) == {COUNT}
)
found = next(parts)
try:
    next(parts)
except KeyboardInterrupt:
    import ray
    print(found.count, int(found.total.sum()), ray.is_initialized())
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        wait_for(lambda: (tmp_path / "waiting").exists() or process.poll() is not None)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        out, err = process.communicate(timeout=30)
    assert (out, err) == (f"{COUNT} {EXPECTED.total.sum()} False\n", "")
    workers = [int(pid) for pid in (tmp_path / "starts").read_text().split()]
    assert len(workers) == 2  # the second in the place of the killed one
    wait_for(lambda: not is_alive(workers[1]))


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.usefixtures("cluster")
def test_statistics_of_a_model_are_the_same_bits() -> None:
    body, x, y = "c = Conv<pads=[1, 1, 1, 1]>(x, w)\ny = Relu(c)", "float[N,3,8,8] x", "float[N,4,8,8] y"
    proto = with_outputs(parse(body, x, y, {"w": normal(4, 3, 3, 3)}), ["c"])
    job = ObserveJob(proto, ("x", "c", "y"), {"c": 1})
    items = [batch(normal(5, 3, 8, 8, seed=seed), seed) for seed in range(12)]
    (found,), (expected,) = Ray(chunk_items=2).run(job, items), Local(3).run(job, items)
    assert found == expected
    assert found.samples == 60


def batch(values: Array, number: int) -> Batch:
    feeds = [{"x": value[None]} for value in values]
    samples = tuple(Sample(feed, digest(feed), 5 * number + index) for index, feed in enumerate(feeds))
    return Batch({"x": values}, samples, len(samples))
