"""The main job from the command to the files and MLflow pages that it leaves, interrupted in every way on the way."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import timm
import torch
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.e2e.command import (
    DEPTHS,
    DIGITS,
    LONG,
    TINY,
    Finished,
    arguments,
    call,
    differing,
    image_folder,
    main_job,
    png,
    read_until,
    shell,
    started,
    variant_weights,
)

ON_RAY = {"placement.backend": "ray", "data.workers": "1"}


def client(store: str) -> MlflowClient:
    return MlflowClient(tracking_uri=store)


def parent_run(store: str, out: Path) -> Run:
    return client(store).get_run(json.loads((out / "tracking.json").read_text())["run_id"])


def child_runs(store: str, parent: Run) -> list[Run]:
    mine = f"tags.mlflow.parentRunId = '{parent.info.run_id}'"
    return list(client(store).search_runs([parent.info.experiment_id], mine))


def artifacts(store: str, run: Run, folder: str | None = None) -> set[str]:
    return {entry.path for entry in client(store).list_artifacts(run.info.run_id, folder)}


# -- the default command ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def default_run(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """`python pipelines/bim_pipeline.py` in an empty folder, on four Ray actors, for two epochs instead of all.

    Most images are for the test: linear probes, which take the most of a short run, are trained on the others.
    """
    here = tmp_path_factory.mktemp("default")
    brief = {
        "schedule.epochs": "2",
        "schedule.warmup_epochs": "0",
        "search.trials": "0",
        "data.test_fraction": "0.8",
    }
    done = shell(arguments(brief), here)
    assert done.status == 0, done.stderr
    (out,) = (here / "runs").iterdir()
    return Finished(done.status, done.stdout, done.stderr, out)


def default_store(run: Finished) -> str:
    return f"sqlite:///{run.out.parents[1]}/mlflow.db"


@pytest.mark.slow
def test_the_default_command_says_what_it_does_and_nothing_else(default_run: Finished) -> None:
    lines = default_run.stdout.splitlines()
    assert default_run.stderr == ""
    assert lines[0].startswith("Ray on this machine: ")
    assert any(line.startswith("blocks 0 | 1 | 2 | 3 on 4 Ray actors, ") for line in lines)
    assert [line.split()[:2] for line in lines if line.startswith("epoch")] == [
        ["epoch", "1/2"],
        ["epoch", "2/2"],
    ]
    assert max(len(line) for line in lines if "http" not in line) <= 100


@pytest.mark.slow
def test_the_default_command_ends_with_a_table_and_where_everything_is(default_run: Finished) -> None:
    text = default_run.stdout
    header = next(line for line in text.splitlines() if line.strip().startswith("depth"))
    assert (
        header.split() == ["depth", "params", "GFLOPs", "ms", "b1", "ms", "b64"] + ["trained", "random"] * 2
    )
    rows = re.findall(r"^ *([2468])  .*±.*±.*±.*±", text, re.MULTILINE)
    assert rows == ["2", "4", "6", "8"]
    assert re.search(r"^raw pixels +\d\d\.\d±\d\.\d +\d\d\.\d±\d\.\d$", text, re.MULTILINE)
    assert f"models:   runs/{default_run.out.name}/variants/depth02 ... depth08" in text
    command, view, run = text.splitlines()[-3:]
    assert command == "compare:  mlflow ui, then open"
    assert "viewStateShareKey=depth-variants&workflowType=machine_learning" in view
    assert run.startswith("this run: http://127.0.0.1:5000/#/experiments/1/runs/")
    assert (default_run.out / "summary.txt").read_text().strip() in text


@pytest.mark.slow
def test_the_four_exported_folders_are_the_trained_blocks_and_open_in_timm(default_run: Finished) -> None:
    trained = [
        safetensors.torch.load_file(file)
        for file in sorted(default_run.out.glob("checkpoints/step-*/block-?.safetensors"))
    ]
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for depth in (2, 4, 6, 8):
        folder = default_run.out / "variants" / f"depth{depth:02d}"
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        assert len(model.blocks) == depth
        assert model(images).isfinite().all()
        last = trained[depth // 2 - 1]
        assert torch.equal(model.blocks[depth - 1].attn.qkv.weight, last["encoder.layers.1.attn.qkv.weight"])
        assert torch.equal(model.norm.weight, last["decoder.norm.weight"])
        assert {file.name for file in folder.iterdir()} == {"model.safetensors", "config.json", "README.md"}


@pytest.mark.slow
def test_the_output_directory_holds_settings_summary_decoders_and_pictures(default_run: Finished) -> None:
    rows = json.loads((default_run.out / "summary.json").read_text())
    assert [(row["weights"], row["depth"]) for row in rows] == [
        *(("trained", depth) for depth in (2, 4, 6, 8)),
        *(("random", depth) for depth in (2, 4, 6, 8)),
        ("raw pixels", None),
    ]
    assert all(0 <= row["knn_top1"] <= 1 and 0 <= row["linear_top1"] <= 1 for row in rows)
    assert all(row["latency_b1_ms"] > 0 for row in rows[:4])
    names = {f"reconstruction_depth{depth:02d}.png" for depth in (2, 4, 6, 8)}
    names |= {f"{name}.png" for name in ("accuracy_against_latency", "loss_by_block", "nearest_neighbors")}
    names.add("reconstructions.png")
    assert {file.name for file in (default_run.out / "pictures").iterdir()} == names
    assert len(list((default_run.out / "decoders").iterdir())) == 4
    assert "epochs: 2\n" in (default_run.out / "settings.yaml").read_text()


@pytest.mark.slow
def test_mlflow_has_a_parent_run_a_child_and_a_registered_version_per_depth(default_run: Finished) -> None:
    store = default_store(default_run)
    parent = parent_run(store, default_run.out)
    assert parent.info.status == "FINISHED"
    assert parent.data.params["mask.ratio"] == "0.75"
    assert parent.data.params["schedule.epochs"] == "2"
    assert {f"block{k}/loss" for k in range(4)} <= parent.data.metrics.keys()
    assert {"settings.yaml", "provenance.json", "summary.csv", "pictures"} <= artifacts(store, parent)
    children = {run.data.tags["variant"]: run for run in child_runs(store, parent)}
    assert set(children) == {"depth2", "depth4", "depth6", "depth8"}
    for depth in (2, 4, 6, 8):
        run = children[f"depth{depth}"]
        assert {"knn_top1", "linear_top1", "params", "latency_b1_ms", "loss"} <= run.data.metrics.keys()
        assert f"reconstruction_depth{depth:02d}.png" in artifacts(store, run)
        (version,) = client(store).search_model_versions(f"name = 'digits_demo-depth{depth:02d}'")
        assert version.run_id == run.info.run_id
    levels = [run.data.tags["level_with_best"] for run in children.values()]
    assert "yes" in levels
    assert set(levels) <= {"yes", "no"}
    note = parent.data.tags["mlflow.note.content"]
    assert re.search(r"^raw pixels +\d\d\.\d±", note, re.MULTILINE)
    assert "models:/digits_demo-depth08/1" in note


# -- other data, other starts -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_baseline_is_trained_beside_and_cut_to_every_depth(tmp_path: Path, store: str) -> None:
    source = image_folder(tmp_path / "images", "{label}/{number}.png", 120)
    done = main_job(
        tmp_path / "run", source, store, baseline="mae", schedule__epochs="2", evaluation__latency="true"
    )
    assert done.status == 0, done.stderr
    assert done.stderr == ""
    assert len(re.findall(r"^mae  epoch \d/2  loss \d", done.stdout, re.MULTILINE)) == 2
    header = next(line for line in done.stdout.splitlines() if line.strip().startswith("depth"))
    assert header.split()[-6:] == ["trained", "MAE", "random"] * 2
    rows = json.loads((done.out / "summary.json").read_text())
    assert [row["depth"] for row in rows if row["weights"] == "mae"] == list(DEPTHS)
    ours, baseline = variant_weights(done.out), variant_weights(done.out / "baseline_mae")
    assert ours.keys() == baseline.keys()
    variants = {run.data.tags["variant"] for run in child_runs(store, parent_run(store, done.out))}
    assert variants == {f"{series}depth{depth}" for series in ("", "mae-") for depth in DEPTHS}


def nested_folder(root: Path) -> tuple[Path, str]:
    """96 training and 40 test images in class directories, and the name of a training image that is cut short."""
    image_folder(root, "train/{label}/{number}.png", 96)
    image_folder(root, "test/{label}/{number}.png", 40, first=96)
    damaged = min(root.glob("train/3/*.png"))
    damaged.write_bytes(damaged.read_bytes()[:60])
    return root, str(damaged.relative_to(root))


def parquet_shards(root: Path) -> tuple[Path, str]:
    """The same images in shards as Hugging Face writes them, and the row that holds no image."""
    root.mkdir()
    names = [str(digit) for digit in range(10)]
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    for split, first, count in (("train", 0, 96), ("test", 96, 40)):
        images = [{"bytes": png(number), "path": f"{number}.png"} for number in range(first, first + count)]
        if split == "train":
            images[17]["bytes"] = b"no image"
        table = pa.table({"image": images, "label": DIGITS.target[first : first + count]})
        table = table.replace_schema_metadata(metadata)
        pq.write_table(table, root / f"{split}-00000-of-00001.parquet", row_group_size=20)
    return root, "train-00000-of-00001.parquet row 17"


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(nested_folder, id="nested folder", marks=pytest.mark.slow),
        pytest.param(parquet_shards, id="Parquet"),
    ],
)
def test_a_damaged_image_is_skipped_counted_and_named(
    tmp_path: Path, store: str, make: Callable[[Path], tuple[Path, str]]
) -> None:
    source, damaged = make(tmp_path / "images")
    few = {"data__batch_size": "16", "data__val_fraction": "0", "schedule__epochs": "2"}
    done = main_job(tmp_path / "run", source, store, data__max_bad_fraction="0.02", **few)
    assert done.status == 0, done.stderr
    assert "96 train / 0 val / 40 test images" in done.stdout
    assert done.stdout.count(f"skipped an unreadable image: {damaged} (") == 1
    assert "±  " in done.stdout  # there are labels, so there are accuracies
    parent = parent_run(store, done.out)
    assert parent.data.metrics["data/bad_images"] == 1
    assert "events.log" in artifacts(store, parent)
    assert damaged in (done.out / "events.log").read_text()

    stopped = main_job(tmp_path / "strict", source, store, **few)
    assert stopped.status == 1
    (told,) = stopped.stderr.splitlines()
    assert f"1 images could not be read, the last being {damaged} (" in told
    assert "and data.max_bad_fraction allows 0" in told
    assert parent_run(store, stopped.out).info.status == "FAILED"


def test_a_folder_without_labels_gives_ranks_in_place_of_accuracies(brief: Finished, store: str) -> None:
    assert brief.stderr == ""
    assert "No accuracy: the data has no labels." in brief.stdout
    assert "top-1" not in brief.stdout
    rows = json.loads((brief.out / "summary.json").read_text())
    assert [row["depth"] for row in rows if row["weights"] == "trained"] == list(DEPTHS)
    assert all(row["knn_top1"] is None and row["params"] > 0 and row["gflops"] > 0 for row in rows)
    assert all(1 <= row["rankme"] <= 32.1 for row in rows)
    assert "RankMe  effective rank of embeddings of 42 training images" in brief.stdout
    assert len(list((brief.out / "variants").iterdir())) == len(DEPTHS)
    assert len(list((brief.out / "pictures").glob("reconstruction_*.png"))) == len(DEPTHS)
    assert (brief.out / "pictures" / "rankme_against_latency.png").exists()
    assert len(child_runs(store, parent_run(store, brief.out))) == len(DEPTHS)


def test_a_run_starts_from_the_weights_that_another_one_exported(
    tmp_path: Path, brief: Finished, unlabeled: Path, store: str
) -> None:
    deepest = brief.out / "variants" / "depth04"
    still = {"schedule__epochs": "1", "optim__blr": "1e-30", "optim__weight_decay": "0"}
    done = main_job(tmp_path / "run", unlabeled, store, init_from=str(deepest), **still)
    assert done.status == 0, done.stderr
    # The final norm belongs to a decoder, and decoders start again.
    assert [name for name in differing(brief.out, done.out) if "/norm." not in name] == []


def test_weights_of_another_shape_are_refused(
    tmp_path: Path, brief: Finished, unlabeled: Path, store: str
) -> None:
    shallow = brief.out / "variants" / "depth02"
    done = main_job(tmp_path / "run", unlabeled, store, init_from=str(shallow))
    assert done.status == 2
    assert re.search(
        r"depth02/.* has no 'blocks.2.*; check backbone.name and backbone.model_args$", done.stderr
    )


# -- runs that do not go through --------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_block_step_and_learning_rate(
    tmp_path: Path, unlabeled: Path, store: str
) -> None:
    done = main_job(tmp_path / "run", unlabeled, store, optim__blr="1e6")
    assert done.status == 1
    (told,) = done.stderr.splitlines()
    assert re.match(
        r"error: the (loss|gradient norm) of block \d is not finite at step \d+ \(learning rate \S+e\+04\); try",
        told,
    )
    assert not (done.out / "variants").exists()
    assert parent_run(store, done.out).info.status == "FAILED"


@pytest.mark.slow
def test_a_signal_ends_a_run_on_ray_with_a_checkpoint_and_resuming_changes_no_bit(
    tmp_path: Path, unbroken: Finished, unlabeled: Path
) -> None:
    where = {"out": "runs/a", "data.source": str(unlabeled)}
    with started(arguments(TINY, LONG, ON_RAY, where), tmp_path) as process:
        before = read_until(process, lambda line: line.startswith("epoch  2/60"))
        os.killpg(process.pid, signal.SIGTERM)  # to the whole group of processes, Ray's among them
        stdout, stderr = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, "".join(before) + stdout + stderr
    assert stderr == ""
    said = stdout.splitlines()
    assert "SIGTERM: saving a checkpoint (at most 15 s); once more stops at once" in said
    assert re.search(r"^checkpoint saved after step \d+ of 300$", stdout, re.MULTILINE)
    assert re.fullmatch(r"stopped by SIGTERM; go on with: python \S+ --out runs/a --resume", said[-1])
    store = f"sqlite:///{tmp_path}/mlflow.db"
    assert parent_run(store, tmp_path / "runs" / "a").info.status == "KILLED"

    # As the last line says, in this process, which is quicker; test_several_backbones.py does it to the letter.
    again = {"placement.backend": "in_process", "tracking.uri": store}
    done = call(["--out", str(tmp_path / "runs" / "a"), *arguments(again), "--resume"])
    assert done.status == 0, done.stderr
    assert re.search(r"^continuing after step \d+ of 300$", done.stdout, re.MULTILINE)
    assert differing(unbroken.out, tmp_path / "runs" / "a") == []
    assert parent_run(store, tmp_path / "runs" / "a").info.status == "FINISHED"


def test_resuming_a_finished_run_changes_nothing(brief: Finished, store: str) -> None:
    before = variant_weights(brief.out)
    versions = client(store).search_model_versions("name = 'digits_demo'")
    done = call(["--out", str(brief.out), "--resume"])
    assert done.status == 0, done.stderr
    assert done.stderr == ""
    assert "checkpoint is already at the last step (10); nothing to train" in done.stdout
    assert not re.search(r"^epoch ", done.stdout, re.MULTILINE)
    after = variant_weights(brief.out)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(child_runs(store, parent_run(store, brief.out))) == len(DEPTHS)
    assert len(client(store).search_model_versions("name = 'digits_demo'")) == len(versions)
