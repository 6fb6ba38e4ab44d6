"""Small models and made-up images for tests of the evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from bim.orchestrator.data.errors import ImageDecodeError
from bim.orchestrator.data.source import Source
from bim.orchestrator.data.splits import Splits
from bim.orchestrator.evaluation.features import (
    build_embedders,
)
from bim.orchestrator.evaluation.inputs import EvalInputs
from bim.orchestrator.evaluation.records import EvalConfig

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


CPU = torch.device("cpu")


QUICK = EvalConfig(latency=False)


@dataclass
class Blobs:
    """Noisy images of two classes, reddish or bluish; some cannot be read."""

    name: str = "blobs"
    n: int = 120
    labeled: bool = True
    bad: tuple[int, ...] = ()
    class_names: tuple[str, ...] | None = None
    fixed_splits: dict[str, np.ndarray] | None = None
    chunks: None = None
    loads: int = 0
    unlabeled: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def labels(self) -> np.ndarray | None:
        labels = np.arange(self.n, dtype=np.int64) % 2
        labels[list(self.unlabeled)] = -1
        return labels if self.labeled else None

    def __len__(self) -> int:
        return self.n

    def load(self, index: int) -> Tensor:
        self.loads += 1
        if index in self.bad:
            raise ImageDecodeError(self.sample_id(index), "made so")
        image = torch.randint(0, 120, (3, 16, 16), generator=torch.Generator().manual_seed(index))
        image[0 if index % 2 == 0 else 2] += 30
        return image.to(torch.uint8)

    def sample_id(self, index: int) -> str:
        return f"blob {index}"

    def fingerprint(self) -> str:
        return "0"


SPLITS = Splits(np.arange(0, 80), np.arange(80, 90), np.arange(90, 120))


def inputs(
    source: Source, config: EvalConfig = QUICK, splits: Splits = SPLITS, size: tuple[int, int] = (16, 16)
) -> EvalInputs:
    return EvalInputs(source, splits, size, MEAN, STD, CPU, config)


def vit(depth: int = 2, **args: Any) -> nn.Module:
    torch.manual_seed(depth)
    small = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": depth}
    pool = {"num_classes": 0, "global_pool": "avg", "fc_norm": False}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **(small | pool | args))
    return model.eval()


def embed(model: nn.Module, *batches: np.ndarray) -> Tensor:
    embedder = build_embedders({0: model}, inputs(Blobs()))[0]
    return torch.cat([embedder(images) for images in batches])
