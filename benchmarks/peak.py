"""Peak memory of a call.

On CPU: PyTorch's profiler sees every block that PyTorch's allocator gives and takes back,
temporaries inside operators and those of the backward pass included, so the peak of their running
sum is exact to the byte and the same on every run. The resident size of a process (ru_maxrss) is
neither: it includes what the allocator of the C library has not given back, and cannot be reset. A
`TorchDispatchMode` sees the results of operators only, not what they allocate inside. On CUDA: the
statistics of the caching allocator.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(case: Callable[[], object], device: torch.device, *, warm: bool = False) -> int:
    """Most bytes held at once during a call, beyond those held before.

    What a first call keeps is not counted; `warm` says that there has been one.
    """
    if not warm:
        case()
    if device.type == "cuda":
        gc.collect()  # what is freed in the call must not have been there before
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        case()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        case()
    events = [
        event
        for event in profiled.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU
    ]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest
