"""Training with its checkpoints in S3: the same weights as with a folder, and what happens while the server is away."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bim.orchestrator.distributed.placement import PlacementError
from bim.orchestrator.distributed.ray_stage_group import RayStages
from bim.orchestrator.training import object_store
from bim.orchestrator.training.callbacks import NullCallback
from bim.orchestrator.training.errors import TrainingError
from bim.orchestrator.training.object_store import ObjectStore
from bim.orchestrator.training.remote_checkpoints import RemoteCheckpointStore, open_remote_folder
from tests.integration import tiny
from tests.integration.object_storage import s3_environment, s3_server

URL = "s3://bucket/checkpoints/first-1a2b"


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    """The port of an S3 server."""
    with s3_server() as port:
        yield port


@pytest.fixture
def s3(server: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """What s3:// means in this process: the server, without any object of this run."""
    for name, value in s3_environment(server).items():
        monkeypatch.setenv(name, value)
    forget_connections()
    RemoteCheckpointStore(URL).remove_all()
    yield server
    forget_connections()


def forget_connections() -> None:
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    open_remote_folder.cache_clear()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps with its checkpoints in a folder."""
    out = tmp_path_factory.mktemp("unbroken")
    tiny.train(tiny.in_process(tiny.tiny_spec(2), 2), out, steps=20, every=10)
    return out


def differing_from(unbroken: Path, store: RemoteCheckpointStore, step: int = 20) -> list[str]:
    folder = store.committed(step)
    assert folder is not None
    return tiny.differing(tiny.state(unbroken, step, 2), tiny.tensors_of(folder, 2))


class Breaks(NullCallback):
    """Calls a function once, when a checkpoint is committed."""

    def __init__(self, step: int, function: object) -> None:
        self._step, self._function = step, function

    def on_checkpoint(self, step: int) -> None:
        if step == self._step:
            self._step = -1
            self._function()  # type: ignore[operator]


@pytest.mark.usefixtures("s3")
def test_weights_are_those_of_a_run_with_a_folder_also_after_an_interruption(
    unbroken: Path, tmp_path: Path
) -> None:
    def die() -> None:
        raise KeyboardInterrupt

    store = RemoteCheckpointStore(URL)
    with pytest.raises(KeyboardInterrupt):
        tiny.train(tiny.in_process(tiny.tiny_spec(2), 2), tmp_path, 20, 10, Breaks(10, die), store=store)
    leftover = ObjectStore(URL)
    leftover.write("step-00000020-aaaaaaaa/block-0.safetensors", b"half")
    store = RemoteCheckpointStore(URL)
    assert tiny.train(tiny.in_process(tiny.tiny_spec(2), 2), tmp_path, 20, 10, store=store).step == 20
    assert differing_from(unbroken, store) == []
    assert len({path.partition("/")[0] for path in leftover.sizes()}) == 2  # steps 10 and 20
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("s3")
def test_a_damaged_part_is_found_by_its_stage_and_the_run_goes_on_from_the_checkpoint_before(
    unbroken: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny.train(tiny.in_process(tiny.tiny_spec(2), 2), tmp_path, 20, 10, store=RemoteCheckpointStore(URL))
    objects = ObjectStore(URL)
    damaged = next(path for path in objects.sizes() if "step-00000020" in path and "block-1.s" in path)
    content = bytearray(objects.read(damaged) or b"")
    content[-1] ^= 1
    objects.write(damaged, bytes(content))
    store = RemoteCheckpointStore(URL)
    assert tiny.train(tiny.in_process(tiny.tiny_spec(2), 2), tmp_path, 20, 10, store=store).restarts == 0
    assert "block-1.safetensors has a wrong checksum" in caplog.text
    assert store.latest() is not None
    assert differing_from(unbroken, store) == []


@pytest.mark.nightly
def test_a_storage_that_stays_away_ends_the_run_with_the_checkpoint_that_stays(
    s3: int, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "RETRY_FOR_S", 0.5)

    def goes_away() -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        forget_connections()

    store = RemoteCheckpointStore(URL, retry_for_s=0.5)
    with pytest.raises(TrainingError, match=r"first-1a2b/step-00000020-\w+ cannot be written to \(Endpoint"):
        tiny.train(
            tiny.in_process(tiny.tiny_spec(2), 2), tmp_path, 20, 10, Breaks(10, goes_away), store=store
        )
    assert store.committed_step == 10
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3}")
    forget_connections()
    store = RemoteCheckpointStore(URL)
    assert tiny.train(tiny.in_process(tiny.tiny_spec(2), 2), tmp_path, 20, 10, store=store).step == 20
    assert differing_from(unbroken, store) == []


@pytest.mark.nightly
@pytest.mark.usefixtures("ray_cluster")
def test_stages_of_ray_write_and_read_their_parts_below_a_url(unbroken: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/checkpoints/first-1a2b"

    def die() -> None:
        raise KeyboardInterrupt

    def train(callback: NullCallback) -> None:
        stages = RayStages(tiny.tiny_spec(2), tiny.data(), tiny.layout(2, 2), url)
        try:
            tiny.train(stages, tmp_path, 20, 10, callback, store=RemoteCheckpointStore(url))
        finally:
            stages.close()

    with pytest.raises(KeyboardInterrupt):
        train(Breaks(10, die))
    train(NullCallback())
    assert differing_from(unbroken, RemoteCheckpointStore(url)) == []
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


@pytest.mark.nightly
@pytest.mark.usefixtures("ray_cluster")
def test_a_url_that_means_something_else_on_the_nodes_is_refused(tmp_path: Path) -> None:
    stages = RayStages(tiny.tiny_spec(2), tiny.data(), tiny.layout(2, 2), "memory://bucket/first-1a2b")
    try:
        with pytest.raises(PlacementError, match="has other content on the node of stage 0"):
            stages.start(lambda: False)
    finally:
        stages.close()
