"""What one image costs a model: parameters, arithmetic, time.

Arithmetic and parameters are exact and the same everywhere; latency belongs to the device it was measured on. Serves
the evaluation of depth variants; it trains nothing and knows no data.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

WARM_UP_S = 0.2
MEASURE_S = 0.6
MAX_REPETITIONS = 100


def num_params(model: nn.Module) -> int:
    """Parameters of the model, those that are never trained (fixed positions) too: what a file of weights holds."""
    return sum(parameter.numel() for parameter in model.parameters())


def gflops(model: nn.Module, size: tuple[int, int]) -> float:
    """GFLOPs of the forward pass of one image of `size` (height, width): 2 x multiply-accumulates / 1e9.

    Matrix products, convolutions and attention are counted. Nothing is computed and no weight is copied: the pass runs
    on the meta device.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors}
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        functional_call(model, meta, (torch.empty(1, 3, *size, device="meta"),))
    return counter.get_total_flops() / 1e9


@torch.inference_mode()
def latency_ms(model: nn.Module, size: tuple[int, int], batch: int, device: torch.device) -> float:
    """Median milliseconds of the float32 forward pass of a batch of noise, (batch, 3, height, width), after warm-up.

    The model is already on `device`. Takes under a second, unless a single pass takes longer: then one pass to warm up
    and one to measure. On a CPU it is the latency at torch's present number of threads.
    """
    images = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
    warm = time.perf_counter()
    _timed_pass(model, images)
    while time.perf_counter() - warm < WARM_UP_S:
        _timed_pass(model, images)
    seconds = [_timed_pass(model, images)]
    while sum(seconds) < MEASURE_S and len(seconds) < MAX_REPETITIONS:
        seconds.append(_timed_pass(model, images))
    return 1e3 * sorted(seconds)[len(seconds) // 2]


def device_name(device: torch.device) -> str:
    """What a latency was measured on: "CPU, 2 threads" or the GPU's name."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    threads = torch.get_num_threads()
    return f"{device.type.upper()}, {threads} thread{'s' if threads > 1 else ''}"


def _timed_pass(model: nn.Module, images: Tensor) -> float:
    start = time.perf_counter()
    model(images)
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)  # kernels are only queued until then
    return time.perf_counter() - start
