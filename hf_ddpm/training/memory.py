"""Estimate the memory of a training step without allocating it, compare it with free memory, fit the batch size."""

import math
import os
import re
import weakref
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_ddpm.config import Config, TrainingConfig
from hf_ddpm.models.precision import autocast
from hf_ddpm.models.unet_2d import UNet2DModel
from hf_ddpm.training.build import build_process, network_options
from hf_ddpm.training.dry_run import count_flops
from hf_ddpm.utils.files import one_line
from hf_ddpm.utils.launch import is_out_of_memory
from hf_ddpm.utils.options import Auto

# Share added for memory that is not counted: scratch space of libraries, images on the device. 2% measured on a CPU.
MARGIN = 0.1
# glibc allocates blocks below 32 MiB from a heap and loses memory to fragmentation: 36 to 60% of these blocks measured,
# almost nothing for larger blocks.
HEAP_BLOCK, HEAP_LOSS = 32 * 2**20, 0.5
# Floats per pixel of the process's share of a global batch: x_0, its flipped image, the noise twice, x_t.
INPUTS = 5
# Options that save memory, in addition to smaller batches.
LESS_MEMORY: dict[str, Any] = {"gradient_checkpointing": True, "mixed_precision": "bf16"}
MEMINFO, CGROUPS, OWN_CGROUPS = Path("/proc/meminfo"), Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


@dataclass(frozen=True)
class MemoryUse:
    """Bytes that a training step needs in each process.

    Attributes:
        weights: Weights, their averages, Adam's moments, accumulated gradients, DDP buckets, weights of a teacher.
        kept: Activations that a forward pass keeps for its backward pass.
        passes: Peak of a forward and backward pass.
        inputs: The images and noise of all passes of a step.
        lost: Heap fragmentation, on a CPU.
    """

    weights: int
    kept: int
    passes: int
    inputs: int
    lost: int

    @property
    def total(self) -> int:
        """The bytes of a step, including the margin."""
        return round((1 + MARGIN) * (self.weights + self.passes + self.inputs + self.lost))


class MemoryPlan:
    """Memory that a training step needs, and free memory.

    Attributes:
        config: The options. If the batch size was `auto`, it is replaced by the largest one that fits, at least 1.
        free: Bytes that each process can allocate; None if unknown.

    Args:
        config: The options; the pipeline of `init_from` or `teacher` is loaded, if given.
        accelerator: Device and number of processes.
        checkpoint: The checkpoint that the run resumes from.
    """

    def __init__(self, config: Config, accelerator: Accelerator, checkpoint: Path | None = None):
        self.network = network_options(config, build_process(config, checkpoint)[1])
        self.config, self.device = config, accelerator.device
        self.processes, self.free = accelerator.num_processes, shared_free_memory(accelerator)
        if isinstance(config.training.train_batch_size, Auto):
            training = self.largest(config.training) or divisions(config.training)[-1]
            self.config = replace(config, training=training)

    def count(self, training: TrainingConfig | None = None) -> MemoryUse:
        """Return the memory of a step, by default with the training options of the run."""
        training = training or self.config.training
        precision = "no" if training.mixed_precision == "auto" else training.mixed_precision  # float32 needs most
        data, passes = self.config.data, training.gradient_accumulation_steps
        batch = training.train_batch_size
        with FakeTensorMode(), torch.device(self.device):
            unet = UNet2DModel(**self.network).train()
            unet.lay_out_kernels()
            if training.gradient_checkpointing:
                unet.enable_gradient_checkpointing()
            unet.seed_dropout(torch.zeros(batch, dtype=torch.int32))
            x, t = torch.empty(batch, data.channels, *data.size), torch.zeros(batch, dtype=torch.int64)
            kept, most, small = count_pass(unet, x, t, precision, keeps_gradients=passes > 1)
        has_teacher = self.config.distillation.teacher is not None
        copies = 1 + len(training.ema_decay) + 2 + (passes > 1) + (self.processes > 1) + has_teacher
        size = sum(weight.numel() * weight.element_size() for weight in unet.parameters())
        pixels = data.channels * math.prod(data.size)
        lost = round(HEAP_LOSS * small) if self.device.type == "cpu" else 0
        return MemoryUse(copies * size, kept, most, INPUTS * 4 * pixels * batch * passes, lost)

    def describe(self) -> dict[str, str]:
        """Return the lines to print, by name: parameters, FLOPs and memory."""
        with FakeTensorMode(), torch.device(self.device):
            unet = UNet2DModel(**self.network)
            x = torch.empty(1, self.config.data.channels, *self.config.data.size)
            forward, both = count_flops(unet, x, 0)
        need, free = self.count(), "unknown" if self.free is None else _mib(self.free)
        passes = f"{_mib(need.passes)} for a forward and backward pass"
        parts = f"{_mib(need.weights)} for weights, averages and optimizer, {passes}"
        return {
            "parameters": f"{unet.num_parameters():,}",
            "FLOPs": f"{forward:.3g} per image forward, {both:.3g} in training",
            "memory": f"{_mib(need.total)} per process: {parts}, {_mib(need.inputs)} for images, "
            f"{_mib(need.lost)} for heap fragmentation, {MARGIN:.0%} margin; free: {free}",
        }

    def fits(self, training: TrainingConfig) -> bool:
        """Return whether a step fits into free memory; True if free memory is unknown."""
        return self.free is None or self.count(training).total <= self.free

    def largest(self, training: TrainingConfig) -> TrainingConfig | None:
        """Return the options with the largest batch size that fits and the same global batch; None if none fits."""
        divided = divisions(training)
        first = bisect_left(divided, True, key=self.fits)
        return divided[first] if first < len(divided) else None

    def rejection(self) -> str | None:
        """Return an error message if the run does not fit, with options that fit; None if it fits or is not checked."""
        training = self.config.training
        if not training.check_memory or self.free is None or (need := self.count().total) <= self.free:
            return None
        each = f" in each of {self.processes} processes" if self.processes > 1 else ""
        return (
            f"--train_batch_size {training.train_batch_size}: a step needs about {_gib(need)} of memory{each}, "
            f"{_gib(need - self.free)} more than is free; expected {self.remedies()}; "
            "to train anyway, set --check_memory false"
        )

    def remedies(self) -> str:
        """Return options that fit: each alone, or all of them together if no single one is enough."""
        training, unused = self.config.training, unused_savings(self.config.training)
        divided = self.largest(training)
        fitting = [] if divided is None else [f"{_division(divided)} (the same run)"]
        fitting += [_saving(name) for name in unused if self.fits(replace(training, **{name: unused[name]}))]
        if not fitting and (divided := self.largest(replace(training, **unused))) is not None:
            fitting = [" ".join([_division(divided), *map(_saving, unused)])]
        return ", or ".join(fitting) or "a smaller network or resolution"


def fit_memory(config: Config, accelerator: Accelerator, checkpoint: Path | None = None) -> Config:
    """Replace the batch size `auto` by the largest one that fits into memory, and check that a step fits.

    Returns:
        The options with the batch size.

    Raises:
        ValueError: If a step does not fit and `check_memory` is true; one line, with options that fit.
    """
    training = config.training
    if not (training.check_memory or isinstance(training.train_batch_size, Auto)):
        return config
    plan = MemoryPlan(config, accelerator, checkpoint)
    rejection = plan.rejection()
    if rejection is not None:
        raise ValueError(rejection)
    return plan.config


def count_pass(
    network: nn.Module, x: Tensor, t: Tensor, mixed_precision: str = "no", keeps_gradients: bool = False
) -> tuple[int, int, int]:
    """Count the bytes that a forward and a backward pass allocate. Pass fake tensors to allocate nothing.

    Args:
        network: The network, in training mode.
        x: Images, shape `(B, C, H, W)`.
        t: Timesteps, shape `(B,)`.
        mixed_precision: `no`, `bf16` or `fp16`.
        keeps_gradients: If true, gradients are accumulated over several forward passes; their buffers are not counted.

    Returns:
        The bytes kept between the passes, the peak, and the peak of blocks below `HEAP_BLOCK`.
    """
    if keeps_gradients:
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
    with torch.enable_grad(), _LiveBytes([x, t, *network.parameters()]) as live:
        with autocast(x.device, mixed_precision):
            output = network(x, t)
        output = getattr(output, "sample", output)
        kept = live.bytes - output.untyped_storage().nbytes()
        output.float().square().mean().backward()
    return kept, live.most, live.most_small


class _LiveBytes(TorchDispatchMode):
    """Count the bytes of live tensors that operations return, without `ignored` tensors and their views."""

    def __init__(self, ignored: list[Tensor]):
        super().__init__()
        self.bytes = self.most = self._small = self.most_small = 0
        self._storages: dict[int, Any] = {id(tensor.untyped_storage()): tensor for tensor in ignored}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        small = size if size < HEAP_BLOCK else 0
        if key in self._storages:
            return

        def free(_: object) -> None:
            del self._storages[key]
            self.bytes -= size
            self._small -= small

        self._storages[key] = weakref.ref(storage, free)
        self.bytes += size
        self.most = max(self.most, self.bytes)
        self._small += small
        self.most_small = max(self.most_small, self._small)


def shared_free_memory(accelerator: Accelerator) -> int | None:
    """Return the smallest free memory of all processes in bytes; None if unknown. Every process must call it."""
    free = free_memory(accelerator.device)
    if accelerator.num_processes > 1:
        own = torch.tensor(2**62 if free is None else free, device=accelerator.device)
        smallest = int(accelerator.gather(own).min())
        free = None if smallest == 2**62 else smallest
    return free


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that this process can still allocate on a device; None if unknown.

    On a GPU, the free memory that the driver reports, and memory that torch has reserved but does not use. On a CPU
    under Linux, the kernel's available memory (`MemAvailable`) or what the limit of a control group leaves, such as a
    container's, whichever is less; divided by the number of processes on this machine.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # of an earlier run
        return torch.cuda.mem_get_info(device)[0] + unused
    available = re.search(r"^MemAvailable:\s+(\d+) kB", _text(MEMINFO), re.MULTILINE)
    if available is None:
        return None
    return min([1024 * int(available[1]), *_left_by_cgroups()]) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _left_by_cgroups() -> Iterator[int]:
    """Yield the bytes left below the memory limits of this process's control groups (cgroup v1 or v2)."""
    for line in _text(OWN_CGROUPS).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, usage, inactive = CGROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, usage = CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            inactive = "total_inactive_file"
        else:
            continue
        own = root / path.strip("/")
        for group in (own, *own.parents):  # a container may see its own group as the root
            if not group.is_relative_to(root):
                break
            most, used = _text(group / limit).strip(), _text(group / usage).strip()
            if most.isdecimal() and used.isdecimal():
                cached = re.search(rf"^{inactive} (\d+)$", _text(group / "memory.stat"), re.MULTILINE)
                # The kernel frees inactive file cache when memory is needed.
                yield max(0, int(most) - int(used) + (int(cached[1]) if cached else 0))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def less_memory(training: TrainingConfig) -> str:
    """Return options that need less memory. All but bf16 change the results by rounding at most."""
    smaller = [part for part in divisions(training) if part.train_batch_size <= training.train_batch_size // 2]
    words = [f"{_division(smaller[0])} (the same run)"] if smaller else []
    words += map(_saving, unused_savings(training))
    return ", or ".join(words) or "a smaller network or resolution"


def divisions(training: TrainingConfig) -> list[TrainingConfig]:
    """Return the options with the same global batch in 1 pass or more, from the largest batch size down to 1."""
    share = training.global_batch_size(processes=1)
    return [
        replace(training, train_batch_size=share // passes, gradient_accumulation_steps=passes)
        for passes in range(1, share + 1)
        if share % passes == 0
    ]


def unused_savings(training: TrainingConfig) -> dict[str, Any]:
    """Return the options of `LESS_MEMORY` that are not in use."""
    return {name: value for name, value in LESS_MEMORY.items() if getattr(training, name) in (False, "no")}


def _saving(name: str) -> str:
    return f"--{name} {str(LESS_MEMORY[name]).lower()}"


def _division(training: TrainingConfig) -> str:
    return (
        f"--train_batch_size {training.train_batch_size} "
        f"--gradient_accumulation_steps {training.gradient_accumulation_steps}"
    )


@contextmanager
def out_of_memory_explained(config: Config) -> Iterator[None]:
    """Convert an out-of-memory error in training to a `MemoryError` whose message lists options that need less."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(f"try {less_memory(config.training)} ({one_line(error)})") from error
