"""Which run an output directory holds, who may write in it, and what a resumed run goes on from."""

from __future__ import annotations

import json
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bim.orchestrator.config.cli import load_settings
from bim.orchestrator.config.schema import Settings
from bim.orchestrator.config.transforms import settings_to_mapping, settings_to_yaml, with_changes
from bim.orchestrator.files import StorageError, atomic_write
from bim.orchestrator.runs.lease import LEASE, acquire
from bim.orchestrator.runs.output_dir import (
    Claim,
    check_output,
    claim,
    open_store,
    remove_unfinished_files,
    resumed_record,
)
from bim.orchestrator.runs.run_identity import (
    RUN_FILE,
    OutputError,
    RunIdentity,
    read_identity,
    write_identity,
)
from bim.orchestrator.training.checkpoint import CheckpointStore, save_block
from bim.orchestrator.training.manifest import MANIFEST, Manifest

RECORD = RunIdentity("0123456789abcdef", "2026-01-02 03:04:05", data="images", has_checkpoint=True)


def recipe(**changes: Any) -> Settings:
    return with_changes(load_settings([]), {key.replace("__", "."): value for key, value in changes.items()})


def resumed(out: Path, **changes: Any) -> Settings:
    return recipe(out=str(out), resume=True, **changes)


def committed(
    out: Path, step: int, run_id: str = RECORD.run_id, data: str = "images", **changes: Any
) -> None:
    store = CheckpointStore(out, keep=9)
    store.make_root()
    records = save_block(store.directory(step), 0, {"encoder.w": torch.zeros(3)}, {"step": torch.ones(1)})
    made = settings_to_mapping(recipe(out=str(out), **changes))
    store.commit(Manifest(step, 5, made, {"data": data}, tuple(records), run_id))


def run_in(out: Path, record: RunIdentity | None = RECORD, **changes: Any) -> Path:
    """A directory with a run in it that has ended: settings and record."""
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "settings.yaml", settings_to_yaml(recipe(out=str(out), **changes)))
    if record is not None:
        write_identity(out, record)
    return out


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


def began(claimed: Claim) -> None:
    with claimed.begin():
        atomic_write(claimed.out / "settings.yaml", "name: x")


# -- a claim ----------------------------------------------------------------------------------------------------------


def test_a_run_that_begins_gets_an_id_and_gives_its_lease_back(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    with claim(out, recipe(), "images") as claimed:
        assert [path.name for path in out.iterdir()] == [LEASE]
        began(claimed)
        record = read_identity(out)
        assert record == claimed.record
        assert record is not None
        assert (record.data, record.has_checkpoint, record.adopted) == ("images", False, False)
    assert sorted(path.name for path in out.iterdir()) == [RUN_FILE, "settings.yaml"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_of_a_run_that_does_not_begin_nothing_is_left(tmp_path: Path, error: type[BaseException]) -> None:
    def fail(out: Path) -> None:
        (out / "pictures").mkdir()
        (out / "pictures" / "x.png").write_text("")
        raise error

    with pytest.raises(error), claim(tmp_path / "a" / "b", recipe()) as claimed, claimed.begin():
        fail(claimed.out)
    assert tree(tmp_path) == {}


def test_a_directory_that_is_not_new_keeps_what_was_in_it(tmp_path: Path) -> None:
    run_in(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(RuntimeError), claim(tmp_path, resumed(tmp_path)):
        raise RuntimeError
    assert tree(tmp_path) == before


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_second_process_is_refused_and_changes_nothing(tmp_path: Path, has_begun: bool) -> None:
    out = tmp_path / "out"
    with claim(out, recipe()) as first:
        if has_begun:
            began(first)
        before = tree(tmp_path)
        for second in [recipe(), *[resumed(out)] * has_begun]:
            with pytest.raises(OutputError, match=r"in use by process \d+ on "):
                check_output(out, second, "")
            with pytest.raises(OutputError, match=r"in use by process \d+ on "), claim(out, second):
                pass
        assert tree(tmp_path) == before
        first.lease.check()


def test_a_run_that_another_one_has_finished_meanwhile_is_not_taken_for_a_new_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    check_output(out, recipe(), "")
    with claim(out, recipe()) as first:
        began(first)
    with pytest.raises(OutputError, match=r"is in use; continue its run with --resume"), claim(out, recipe()):
        pass
    assert (out / "settings.yaml").exists()


def test_what_is_left_of_a_process_that_was_killed_before_its_run_began_is_no_run(tmp_path: Path) -> None:
    (tmp_path / LEASE).write_text("{}")
    (tmp_path / f".{LEASE}.1234.tmp").write_text("")
    check_output(tmp_path, recipe(), "")


def test_every_backbone_and_their_comparison_are_held(tmp_path: Path) -> None:
    with ExitStack() as stack:
        for out in (tmp_path / "out", tmp_path / "out" / "vit"):
            stack.enter_context(claim(out, recipe()))
        for out in (tmp_path / "out", tmp_path / "out" / "vit"):
            with pytest.raises(OutputError, match="in use by process"), claim(out, recipe()):
                pass
    assert tree(tmp_path) == {}


# -- what a run goes on from ------------------------------------------------------------------------------------------


def latest_step(out: Path) -> int | None:
    latest = open_store(out).latest()
    return None if latest is None else latest.step


def test_only_checkpoints_of_the_run_itself_are_read(tmp_path: Path) -> None:
    run_in(tmp_path)
    committed(tmp_path, 5)
    committed(tmp_path, 7, run_id="another")
    committed(tmp_path, 9, run_id="")
    assert latest_step(tmp_path) == 5
    problems = open_store(tmp_path).problems()
    assert problems["step-00000007"] == f"it is of the run another, and run.json says {RECORD.run_id}"
    assert problems["step-00000009"] == f"it has no run id, so it is not of the run {RECORD.run_id}"
    check_output(tmp_path, resumed(tmp_path), "images")


def test_a_new_run_reads_no_checkpoint(tmp_path: Path) -> None:
    with claim(tmp_path / "out", recipe(), "images") as claimed:
        began(claimed)
        committed(claimed.out, 5)  # put there meanwhile
        assert latest_step(claimed.out) is None


def test_a_run_of_an_earlier_version_gets_an_id_when_it_is_resumed(tmp_path: Path) -> None:
    run_in(tmp_path, record=None)
    committed(tmp_path, 5, run_id="")
    check_output(tmp_path, resumed(tmp_path), "images")
    assert not (tmp_path / RUN_FILE).exists()
    with claim(tmp_path, resumed(tmp_path), "images") as claimed:
        began(claimed)
        committed(tmp_path, 6, run_id=claimed.record.run_id)
    assert latest_step(tmp_path) == 6
    committed(tmp_path, 7, run_id="another")
    assert latest_step(tmp_path) == 6
    with claim(tmp_path, resumed(tmp_path), "images") as again:
        assert again.record.run_id == claimed.record.run_id


def test_a_record_that_is_missing_is_made_again_from_the_checkpoints(tmp_path: Path) -> None:
    run_in(tmp_path, record=None)
    committed(tmp_path, 5)
    assert resumed_record(tmp_path).run_id == RECORD.run_id
    committed(tmp_path, 7, run_id="another")
    with pytest.raises(
        OutputError, match=r"run\.json is missing, and the checkpoints .* of several runs \(0123.*another\)"
    ):
        check_output(tmp_path, resumed(tmp_path), "images")


def damaged(out: Path) -> None:
    (out / "checkpoints" / "step-00000005" / MANIFEST).write_text("{")


def of_another_format(out: Path) -> None:
    path = out / "checkpoints" / "step-00000005" / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))


def without_files(out: Path) -> None:
    (out / "checkpoints" / "step-00000005" / "block-0.safetensors").unlink()


def uncommitted(out: Path) -> None:
    (out / "checkpoints" / "step-00000005" / MANIFEST).unlink()


def gone(out: Path) -> None:
    (out / "checkpoints").rename(out.parent / "lost")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (damaged, r"step-00000005: unreadable manifest \(it is not JSON\)"),
        (of_another_format, r"step-00000005: unreadable manifest \(format 99, this version reads 1\)"),
        (without_files, r"step-00000005: block-0.safetensors is missing"),
        (uncommitted, r"step-00000005: no manifest"),
        (gone, r"the checkpoints of the run are gone from"),
    ],
)
def test_a_run_is_never_begun_again_unasked(tmp_path: Path, spoil: Any, told: str) -> None:
    out = run_in(tmp_path / "out")
    committed(out, 5)
    check_output(out, resumed(out), "images")
    spoil(out)
    before = tree(out)
    with pytest.raises(OutputError, match=told) as caught:
        check_output(out, resumed(out), "images")
    assert "--resume --from-scratch" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    check_output(out, resumed(out, from_scratch=True), "images")
    assert tree(out) == before


def test_a_run_that_was_cut_off_before_its_first_checkpoint_begins_again(tmp_path: Path) -> None:
    run_in(tmp_path, replace(RECORD, has_checkpoint=False))
    check_output(tmp_path, resumed(tmp_path), "images")
    save_dir = tmp_path / "checkpoints" / "step-00000005"
    save_dir.mkdir(parents=True)
    (save_dir / "block-0.safetensors").write_text("half")
    check_output(tmp_path, resumed(tmp_path), "images")


@pytest.mark.parametrize("has_checkpoint", [False, True])
def test_images_that_have_moved_are_the_same_by_their_fingerprint(
    tmp_path: Path, has_checkpoint: bool
) -> None:
    run_in(tmp_path, replace(RECORD, has_checkpoint=has_checkpoint), data__source="/old/place")
    if has_checkpoint:
        committed(tmp_path, 5, data__source="/old/place")
    moved = resumed(tmp_path, data__source="/new/place")
    check_output(tmp_path, moved, "images")
    with pytest.raises(OutputError, match=r"the images behind data\.source have changed"):
        check_output(tmp_path, moved, "others")


def test_images_of_which_no_fingerprint_is_known_must_not_move(tmp_path: Path) -> None:
    run_in(tmp_path, record=None, data__source="/old/place")
    with pytest.raises(OutputError, match=r"data\.source is /new/place, was /old/place"):
        check_output(tmp_path, resumed(tmp_path, data__source="/new/place"), "images")


def test_other_seeds_are_refused_with_and_without_a_checkpoint(tmp_path: Path) -> None:
    run_in(tmp_path, replace(RECORD, has_checkpoint=False))
    for _ in range(2):
        with pytest.raises(OutputError, match="seed is 1, was 0"):
            check_output(tmp_path, resumed(tmp_path, seed=1), "images")
        committed(tmp_path, 5)


# -- records of any content -------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary()
    | VALUES.map(lambda value: json.dumps(value).encode())
    | st.tuples(st.sampled_from(["run_id", "created", "data", "adopted", "has_checkpoint"]), VALUES).map(
        lambda pair: json.dumps(RECORD.__dict__ | {pair[0]: pair[1]}).encode()
    )
)
def test_a_record_of_any_content_is_read_or_refused_in_a_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / RUN_FILE).write_bytes(content)
    told = f"{RUN_FILE} is damaged"
    with suppress(OutputError):
        assert isinstance(read_identity(tmp_path), RunIdentity)
        return
    with pytest.raises(OutputError, match=told):
        read_identity(tmp_path)


def test_a_directory_in_the_place_of_a_record_is_told(tmp_path: Path) -> None:
    run_in(tmp_path, record=None)
    (tmp_path / RUN_FILE).mkdir()
    with pytest.raises(OutputError, match=r"run\.json cannot be read \(Is a directory\)"):
        check_output(tmp_path, resumed(tmp_path), "images")
    with pytest.raises(StorageError, match=r"run\.json cannot be written"):
        write_identity(tmp_path, RECORD)


def test_a_directory_in_the_place_of_the_lease_is_told(tmp_path: Path) -> None:
    (tmp_path / LEASE).mkdir()
    with pytest.raises(OutputError, match="cannot be made or written to"), claim(tmp_path, recipe()):
        pass


def test_unfinished_files_of_another_process_that_took_the_directory_over_stay(tmp_path: Path) -> None:
    (tmp_path / ".settings.yaml.7.tmp").touch()
    with acquire(tmp_path, "run") as lease:
        content = json.loads((tmp_path / LEASE).read_text())
        (tmp_path / LEASE).write_text(json.dumps(content | {"token": "of another", "pid": 2**31 - 1}))
        remove_unfinished_files(tmp_path, [lease])
        assert (tmp_path / ".settings.yaml.7.tmp").exists()
    with acquire(tmp_path, "run") as lease:
        remove_unfinished_files(tmp_path, [lease])
    assert not (tmp_path / ".settings.yaml.7.tmp").exists()


@pytest.mark.parametrize("content", [b"\xff", b"a: [", b"3", b"[" * 5000], ids=repr)
def test_saved_settings_that_are_no_recipe_are_told(tmp_path: Path, content: bytes) -> None:
    run_in(tmp_path, replace(RECORD, has_checkpoint=False))
    (tmp_path / "settings.yaml").write_bytes(content)
    with pytest.raises(OutputError, match=r"settings\.yaml .*; put the settings of the run back"):
        check_output(tmp_path, resumed(tmp_path), "images")


def test_a_manifest_whose_settings_are_nested_without_end_is_told(tmp_path: Path) -> None:
    run_in(tmp_path)
    committed(tmp_path, 5)
    (manifest,) = tmp_path.rglob(MANIFEST)
    nested = "[" * 900 + "]" * 900
    content = json.dumps(json.loads(manifest.read_text()) | {"settings": {"name": "HERE"}})
    manifest.write_text(content.replace('"HERE"', nested))
    with pytest.raises(
        OutputError, match="settings that this version does not know: settings are nested too deeply"
    ):
        check_output(tmp_path, resumed(tmp_path), "images")
