"""Cost of one image: parameters, FLOPs, latency.

FLOPs and parameters are exact and the same everywhere; latency belongs to the device it was measured on.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bim.models.backbones.backbone import Backbone
from bim.models.initialization import NoInitialization
from bim.orchestrator.evaluation.progress import report_again
from bim.orchestrator.training.build import build_local_mim, mask_plans
from bim.orchestrator.training.spec import PretrainSpec

WARM_UP_S, MEASURE_S = 0.2, 0.6
"""Seconds of warm-up and of measurement of one model."""

MAX_REPETITIONS = 100


def num_params(model: nn.Module) -> int:
    """Parameters of the model as a file of weights holds them, those that are never trained (fixed positions) too."""
    return sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def counting_flops() -> Iterator[FlopCounterMode]:
    """Count the FLOPs of what runs inside, whatever kernel the installed torch would choose for attention.

    PyTorch has no FLOP formula for some fused attention kernels (the CPU one among them) and counts nothing for them. Under
    the math kernel attention is two matrix products, which every version counts.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def gflops(model: nn.Module, size: tuple[int, int]) -> float:
    """GFLOPs of the forward pass of one image of `size` (height, width): 2 x multiply-accumulates / 1e9.

    Matrix products, convolutions and attention are counted. Nothing is computed and no weight is copied: the pass runs
    on the meta device.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors}
    with torch.inference_mode(), counting_flops() as counter:
        functional_call(model, meta, (torch.empty(1, 3, *size, device="meta"),))
    return counter.get_total_flops() / 1e9


@torch.inference_mode()
def latencies_ms(
    models: Mapping[int, nn.Module], size: tuple[int, int], batch: int, device: torch.device
) -> dict[int, float]:
    """Median milliseconds of each model's float32 forward pass of a batch of noise, (batch, 3, height, width).

    The models are already on `device`; each is warmed up, then they take turns, so that load from elsewhere slows all of
    them alike and their order can be trusted. `torch.utils.benchmark.Timer` times one model after the other and warms up
    before every block. Takes under a second per model, unless a single pass takes longer: then one pass to warm up and
    one to measure. On a CPU it is the latency at torch's present number of threads.
    """
    images = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
    for model in models.values():
        start = time.perf_counter()
        _timed_pass(model, images)
        while time.perf_counter() - start < WARM_UP_S:
            _timed_pass(model, images)
    seconds: dict[int, list[float]] = {name: [] for name in models}
    total_s, turns = 0.0, 0
    while turns == 0 or (total_s < MEASURE_S * len(models) and turns < MAX_REPETITIONS):
        for name, model in models.items():
            seconds[name].append(_timed_pass(model, images))
            total_s += seconds[name][-1]
        turns += 1
    return {name: 1e3 * statistics.median_high(times) for name, times in seconds.items()}


def device_name(device: torch.device) -> str:
    """Name of the device of a latency: "CPU, 2 threads" or that of the GPU."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    threads = torch.get_num_threads()
    return f"{device.type.upper()}, {threads} thread{'s' if threads > 1 else ''}"


def _timed_pass(model: nn.Module, images: Tensor) -> float:
    report_again()
    start = time.perf_counter()
    model(images)
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)  # kernels are only queued until then
    return time.perf_counter() - start


def forward_gflops(spec: PretrainSpec, backbone: Backbone, size: tuple[int, int]) -> float:
    """GFLOPs (2 x multiply-accumulates / 1e9) for one image of `size` (height, width); see `block_gflops`."""
    return sum(encoder + decoder for encoder, decoder in block_gflops(spec, backbone, size))


def block_gflops(spec: PretrainSpec, backbone: Backbone, size: tuple[int, int]) -> list[tuple[float, float]]:
    """(encoder, decoder) of every block, GFLOPs for one image of `size` (height, width).

    One image of zeros is computed in a fraction of a second, not on the meta device: positions of other sizes than that of
    the backbone depend on the values of its table.
    """
    spec = replace(spec, init_from=None)  # the values of weights do not count
    plans = mask_plans(spec, backbone, size, batch_size=1, step=0, micro_step=0)
    x = torch.zeros(1, 3, *size)
    costs = []
    with torch.no_grad():
        for k in range(len(spec.blocks)):
            with NoInitialization():
                module = build_local_mim(spec, k, backbone).eval()
            with counting_flops() as encoder:
                x = module.encoder(x, plans[k])
            with counting_flops() as decoder:
                module.decoder(x, plans[k])
            costs.append((encoder.get_total_flops() / 1e9, decoder.get_total_flops() / 1e9))
    return costs
