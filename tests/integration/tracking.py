"""A tracker on the store of the test's working directory, and what it records."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import timm
import torch
from mlflow import MlflowClient
from safetensors.torch import save_file

from bim.orchestrator.tracking.records import DepthRecord
from bim.orchestrator.tracking.tracker import Tracker

ARGS = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 16,
    "num_heads": 2,
    "num_classes": 0,
    "global_pool": "avg",
}


def open_tracker(
    out: Path, name: str = "a run", resume: str | None = None, model_name: str | None = None
) -> Tracker:
    out.mkdir(exist_ok=True)
    return Tracker.open(None, "bim", name, out, resume, model_name, interval=0.05)


def export(folder: Path, depth: int, seed: int = 0) -> Path:
    """A timm folder, as the exporter writes it."""
    torch.manual_seed(seed)
    args = {**ARGS, "depth": depth, "fc_norm": False}
    model = timm.create_model("vit_tiny_patch16_224", **args)
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    cfg = {
        "input_size": [3, 32, 32],
        "num_classes": 0,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 0,
        "model_args": args,
        "pretrained_cfg": cfg,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text("card\n")
    return folder


def record(folder: Path, depth: int = 2) -> DepthRecord:
    return DepthRecord(
        depth=depth,
        folder=folder,
        metrics={
            "knn_top1": 0.9,
            "knn_top1_se": 0.01,
            "linear_top1": 0.8,
            "latency_b1_ms": 3.5,
            "params": 1e5,
        },
        params={"depth": depth, "mask_ratio": 0.75},
        curves={"loss": [(step, 1 / (1 + step)) for step in range(2000)]},
        step=2000,
    )


def steps(client: MlflowClient, run_id: str, name: str) -> list[int]:
    return sorted(metric.step for metric in client.get_metric_history(run_id, name))


@contextlib.contextmanager
def outage(home: Path, leaves_nothing: bool = False) -> Iterator[None]:
    """Within the block the store of a working directory cannot be opened.

    A folder stands in its place. Where nothing stands there, SQLite creates an empty database at the next connection,
    and this process keeps that connection after the outage.

    Args:
        leaves_nothing: whether nothing stands in its place; for tests in which no connection is open.
    """
    store, elsewhere = home / "mlflow.db", home / "elsewhere.db"
    store.rename(elsewhere)
    if not leaves_nothing:
        store.mkdir()
    try:
        yield
    finally:
        if not leaves_nothing:
            store.rmdir()
        elsewhere.rename(store)


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition was never met"
        time.sleep(0.01)
