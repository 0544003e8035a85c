"""Precision of a network's passes: autocast, and a choice by measurement."""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hf_ddpm.utils.launch import is_out_of_memory

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISION_NAMES = {"no": "float32", "bf16": "bf16", "fp16": "fp16"}
# Speed of bf16 relative to float32 from which it is chosen: above the noise of a measurement.
GAIN = 1.15
# Operations below which bf16 is not tried, since casts and calls take most of the time: per image, or per pass of a
# compiled network.
FEWEST_FLOPS = 2e8
# Operations of a measured forward pass: a fraction of a second on a CPU core, more than the calls take on a GPU.
MEASURED_FLOPS = {"cpu": 1.6e10, "cuda": 2e12}
# Length of a measurement: seconds, and the fewest and most passes per precision after the first.
SECONDS, FEWEST_PASSES, MOST_PASSES = 1.5, 3, 15

T = TypeVar("T")


@dataclass(frozen=True)
class Choice:
    """A precision, and a line on the reason."""

    precision: str
    line: str


def autocast(device: torch.device | str, precision: str) -> torch.autocast:
    """Return the context of passes in `no` (that of the weights), `bf16` or `fp16` on a device."""
    return torch.autocast(torch.device(device).type, PRECISIONS[precision], enabled=precision != "no")


def cast_copy(network: Any, precision: str) -> Any:
    """Return a copy of a network with weights in `bf16` or `fp16`, for inference: autocast casts them in every pass."""
    half = nn.Module.to(copy.deepcopy(network), PRECISIONS[precision])  # the method of diffusers logs a false warning
    for weight in half.parameters():
        weight.grad = None
    return half


def choose_precision(
    network: Any, shape: Sequence[int], batch: int, training: bool = False, compiled: bool = False
) -> Choice:
    """Choose `bf16` if the device has it and the network is at least `GAIN` times as fast in it, else `no`.

    Weights, gradients, mode and random state stay as they are. It takes two or three seconds on a CPU.

    Args:
        network: The network, on its device, not compiled.
        shape: Shape of an image, `(C, H, W)`.
        batch: Batch size of a pass; on a CPU fewer images, and smaller ones, are measured.
        training: Whether to measure a forward and a backward pass instead of one without gradients.
        compiled: Whether it is for sampling with a compiled network: `bf16` without a measurement, since fused casts
            cost nothing, unless a pass is tiny.
    """
    weight = next(network.parameters())
    if weight.dtype != torch.float32:
        return Choice("no", f"precision {str(weight.dtype).removeprefix('torch.')}: that of the weights")
    if not has_bf16(weight.device):
        return Choice("no", f"precision float32: no native bf16 on this {weight.device.type.upper()} device")
    # An upper bound: each weight is multiplied and added at most once per pixel.
    most_flops = 2 * sum(weight.numel() for weight in network.parameters()) * shape[-2] * shape[-1]
    if most_flops * (batch if compiled else 1) < FEWEST_FLOPS:
        return Choice("no", "precision float32: the network is too small for bf16 to pay")
    if compiled:
        return Choice("bf16", "precision bf16: faster in compiled networks on this device")
    try:
        gain = measure_gain(network, shape, batch, training)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return Choice("bf16", "precision bf16: passes in float32 do not fit into memory")
    if gain >= GAIN:
        return Choice("bf16", f"precision bf16: {gain:.1f} times as fast as float32 here")
    return Choice("no", f"precision float32: bf16 is only {gain:.1f} times as fast here")


def has_bf16(device: torch.device) -> bool:
    """Return whether a device has instructions for products in bf16; others emulate them."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    if not hasattr(torch.cpu, "get_capabilities"):  # older versions of torch
        return torch.cpu._is_avx512_bf16_supported()
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def on_main_process(compute: Callable[[], T]) -> T:
    """Return what the main process computes; every process must call it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return compute()
    found = [compute() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(found, src=0)
    return found[0]  # type: ignore[return-value]


def measure_gain(network: Any, shape: Sequence[int], batch: int, training: bool) -> float:
    """Return how many times as fast as in float32 a network is in bf16."""
    weights, modes = list(network.parameters()), [(module, module.training) for module in network.modules()]
    device = weights[0].device
    x, *conditions = _inputs(network, shape, batch)

    def train(precision: str) -> None:
        with autocast(device, precision):
            output = network(x, *conditions).sample
        torch.autograd.grad(output.float().square().mean(), weights, allow_unused=True)

    @torch.no_grad()
    def sample(precision: str) -> None:
        networks[precision](x.to(PRECISIONS[precision]), *conditions)

    try:
        network.train(training)
        if training:
            network.seed_dropout(torch.zeros(len(x), dtype=torch.int32, device=device))  # as in a run
        else:
            networks = {"no": network, "bf16": cast_copy(network, "bf16")}
        one_pass = train if training else sample
        return _gain(lambda precision: _seconds(lambda: one_pass(precision), device))
    finally:
        for module, mode in modes:
            module.training = mode
        if training:
            network.seed_dropout(None)


def _gain(seconds: Callable[[str], float]) -> float:
    """Return the median ratio of the times of passes in turn; `seconds` takes a pass in a precision."""
    seconds("no"), seconds("bf16")  # the first passes are slower
    ratios: list[float] = []
    total = 0.0
    while len(ratios) < FEWEST_PASSES or (total < SECONDS and len(ratios) < MOST_PASSES):
        exact, half = seconds("no"), seconds("bf16")
        ratios.append(exact / half)
        total += exact + half
    return statistics.median(ratios)


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _inputs(network: Any, shape: Sequence[int], batch: int) -> tuple[Tensor, int, Tensor | None]:
    """Return images, a timestep and classes for a pass of at most `MEASURED_FLOPS`, or of one small image."""
    device = next(network.parameters()).device
    channels, height, width = shape
    multiple = 2 * 2 ** (len(network.config.block_out_channels) - 1)

    def inputs(count: int) -> tuple[Tensor, int, Tensor | None]:
        x = torch.linspace(-1, 1, count * channels * height * width, device=device).view(count, channels, height, width)
        has_classes = network.config.num_class_embeds is not None
        return x, 0, torch.zeros(count, dtype=torch.int64, device=device) if has_classes else None

    most = MEASURED_FLOPS[device.type]
    while (flops := _flops(network, *inputs(1))) > most and height % multiple == width % multiple == 0:
        height, width = height // 2, width // 2
    return inputs(max(1, min(batch, int(most / flops))))


def _flops(network: Any, *inputs: Any) -> float:
    """Count the operations of a forward pass on a copy without weights, which computes nothing."""
    with torch.device("meta"):
        copy = type(network).from_config(network.config).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy(*(value.to("meta") if isinstance(value, Tensor) else value for value in inputs))
    return counter.get_total_flops()
