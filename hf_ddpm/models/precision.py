"""Mixed precision: autocast, and automatic choice of bf16 or float32 by measurement."""

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
# Smallest speedup over float32 at which bf16 is chosen; larger than the measurement noise.
GAIN = 1.15
# Networks with fewer operations stay in float32, as casts and kernel launches take most of their time. Counted per
# image, or per forward pass for compiled networks.
FEWEST_FLOPS = 2e8
# Size of a measured forward pass: a fraction of a second on one CPU core; on a GPU more than the launch overhead.
MEASURED_FLOPS = {"cpu": 1.6e10, "cuda": 2e12}
# Duration of a measurement: seconds, and minimum and maximum number of passes per precision after the warm-up.
SECONDS, FEWEST_PASSES, MOST_PASSES = 1.5, 3, 15

T = TypeVar("T")


@dataclass(frozen=True)
class Choice:
    """A precision, and one line with the reason for the log."""

    precision: str
    line: str


def autocast(device: torch.device | str, precision: str) -> torch.autocast:
    """Return the autocast context for a device and a precision; `no` keeps the precision of the weights."""
    return torch.autocast(torch.device(device).type, PRECISIONS[precision], enabled=precision != "no")


def cast_copy(network: Any, precision: str) -> Any:
    """Return a copy with weights in `bf16` or `fp16` for inference; autocast would cast them in every forward pass."""
    half = nn.Module.to(copy.deepcopy(network), PRECISIONS[precision])  # `to` of diffusers logs a wrong warning
    for weight in half.parameters():
        weight.grad = None
    return half


def choose_precision(
    network: Any, shape: Sequence[int], batch: int, training: bool = False, compiled: bool = False
) -> Choice:
    """Choose `bf16` if the device supports it and it makes the network at least `GAIN` times as fast, else `no`.

    Weights, gradients, mode and random state do not change. The measurement takes two or three seconds on a CPU.

    Args:
        network: The network, on its device, not compiled.
        shape: Shape of an image, `(C, H, W)`.
        batch: Batch size of a forward pass; on a CPU fewer and smaller images are measured.
        training: Measure a forward and a backward pass instead of a forward pass without gradients.
        compiled: Choose for sampling with a compiled network: `bf16` without a measurement, since fused casts cost
            nothing, but `no` for very small networks.

    Returns:
        The precision and the reason.
    """
    weight = next(network.parameters())
    if weight.dtype != torch.float32:
        return Choice("no", f"precision {str(weight.dtype).removeprefix('torch.')}: the precision of the weights")
    if not has_bf16(weight.device):
        return Choice("no", f"precision float32: no native bf16 on this {weight.device.type.upper()} device")
    # An upper bound: each weight is multiplied and added at most once per pixel.
    most_flops = 2 * sum(weight.numel() for weight in network.parameters()) * shape[-2] * shape[-1]
    if most_flops * (batch if compiled else 1) < FEWEST_FLOPS:
        return Choice("no", "precision float32: the network is too small for bf16 to be faster")
    if compiled:
        return Choice("bf16", "precision bf16: faster for compiled networks on this device")
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
    """Return whether a device has native instructions for bf16 matrix products, rather than emulating them."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    if not hasattr(torch.cpu, "get_capabilities"):  # older versions of torch
        return torch.cpu._is_avx512_bf16_supported()
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def on_main_process(compute: Callable[[], T]) -> T:
    """Compute a value on the main process and return it on all processes; every process must call this function."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return compute()
    result = [compute() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(result, src=0)
    return result[0]  # type: ignore[return-value]


def measure_gain(network: Any, shape: Sequence[int], batch: int, training: bool) -> float:
    """Return the speedup of a network in bf16 over float32."""
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
            network.seed_dropout(torch.zeros(len(x), dtype=torch.int32, device=device))  # as in training
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
    """Return the median speedup over alternating passes; `seconds` times one pass in a precision."""
    seconds("no"), seconds("bf16")  # warm-up
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
    """Return images, a timestep and classes for a pass of at most `MEASURED_FLOPS`, but at least one image."""
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
    """Count the operations of a forward pass, on a copy on the meta device that computes nothing."""
    with torch.device("meta"):
        copy = type(network).from_config(network.config).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy(*(value.to("meta") if isinstance(value, Tensor) else value for value in inputs))
    return counter.get_total_flops()
