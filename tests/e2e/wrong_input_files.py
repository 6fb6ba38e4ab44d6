"""The files that the wrong inputs of the main job name."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from tests.e2e.command import image_folder, png

RECIPES: dict[str, str] = {
    "nul": "seed: 0\x00\n",
    "huge": "# a comment\n" * 30_000,
    "list": "- 3\n",
    "text": "hello\n",
    "empty": "",
    "twice": "seed: 0\nseed: 1\n",
    "recursive": "search: {space: {optim.blr: &a [*a]}}\n",
    "recursive_map": "backbone: &b {model_args: *b}\n",
    "deep": "seed: " + "[" * 2_000 + "]" * 2_000 + "\n",
    "deep_blocks": "".join(f"{' ' * level}a:\n" for level in range(100)),
    "bomb": "search:\n  space:\n    a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
    + "".join(f"    {n}: &{n} [{', '.join([f'*{p}'] * 10)}]\n" for p, n in zip("abcdefg", "bcdefgh", strict=True)),
    "tag_int": "seed: !!int abc\n",
    "tag_float": "optim: {blr: !!float x}\n",
    "tag_bool": "data: {flip: !!bool maybe}\n",
    "tag_null": "out: !!null x\n",
    "tag_python": "seed: !!python/object/apply:os.getpid []\n",
    "tag_binary": "name: !!binary AAAA\n",
    "tag_set": "name: !!set {a, b}\n",
    "tag_time": "name: !!timestamp never\n",
    "anchor": "seed: *nowhere\n",
    "digits": f"seed: {'9' * 5000}\n",
    "documents": "seed: 0\n---\nseed: 1\n",
    "unknown": "name: x\nbackbone: {name: vit_tiny_patch16_224}\nmask: {ratoi: 0.5}\n"
    "data: {source: digits, batch_size: 64}\nschedule: {epochs: 1}\n",
    "flat": "name: x\nbackbone: {name: vit_tiny_patch16_224}\nmask.ratio: 0.5\n"
    "data: {source: digits, batch_size: 64}\nschedule: {epochs: 1}\n",
}  # fmt: skip


def write_files(here: Path) -> None:
    """The files that the cases name."""
    (here / "recipes").mkdir()
    for name, text in RECIPES.items():
        (here / "recipes" / f"{name}.yaml").write_text(text)
    (here / "recipes" / "binary.yaml").write_bytes(b"\x80\xff\x00")
    (here / "photo.png").write_bytes(png(0))
    (here / "empty").mkdir()
    for folder in ("pipes", "both", "damaged", "links", "loop", "mixed", "kinds", "used", "badconfig"):
        (here / folder).mkdir()
    for pipe in ("pipe.png", "pipe.parquet", "pipes/a.png"):
        os.mkfifo(here / pipe)
    (here / "both" / "a.png").write_bytes(png(0))
    (here / "loop" / "again").symlink_to(here / "loop")
    (here / "used" / "precious.txt").write_text("keep me")
    for number in range(20):
        (here / "damaged" / f"{number}.png").write_bytes(png(number)[:60])
        (here / "links" / f"{number}.png").symlink_to(here / "gone" / f"{number}.png")
    image_folder(here / "few", "{number}.png", 3)
    image_folder(here / "flat", "{number}.png", 40)

    rows = 40
    images = [png(number) for number in range(rows)]
    good = {
        "image": images,
        "label": [number % 2 for number in range(rows)],
        "half": [number % 2 or None for number in range(rows)],
        "score": np.linspace(0, 1, rows),
        "tags": [[number] for number in range(rows)],
    }
    tables = {
        "good.parquet": good,
        "both/b.parquet": {"image": images},
        "empty.parquet": {"image": pa.array([], pa.binary())},
        "no_image.parquet": {"id": [1], "text": ["a"]},
        "junk.parquet": {"image": [b"junk"] * rows},
        "mixed/a.parquet": {"image": images},
        "mixed/b.parquet": {"image": ["text"] * rows},
        "kinds/a.parquet": {"image": images, "label": [0] * rows},
        "kinds/b.parquet": {"image": images, "label": ["cat"] * rows},
    }
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), here / name)
    (here / "text.parquet").write_text("PAR1 is how it begins")

    (here / "notes.pth").write_text("these are notes")
    (here / "notes.safetensors").write_text("these are notes")
    (here / "pickle.pth").write_bytes(b"\x80\x02cos\nsystem\n(X\x0b\x00\x00\x00touch tracetR.")
    torch.save({"epoch": 3}, here / "none.pth")
    save_file({"weight": torch.zeros(2)}, here / "other.safetensors")
    save_file({"weight": torch.zeros(2)}, here / "badconfig" / "model.safetensors")
    (here / "badconfig" / "config.json").write_text('{"model_args": {"img_size": "large"}}')
