"""The memory that a task takes, by itself."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from hf_ddpm.benchmark.device import peak_memory
from hf_ddpm.benchmark.library import Library
from hf_ddpm.benchmark.options import BenchmarkConfig
from hf_ddpm.benchmark.setting import Setting
from hf_ddpm.benchmark.timing import unseen
from hf_ddpm.config import Config

ON_GPU = "the most that torch's allocator has handed out at once (torch.cuda.max_memory_allocated)"
ON_CPU = "the most that a process for this task alone holds, beyond what it holds before (Linux: VmHWM)"


def taken(kind: type[Library], task: str, options: BenchmarkConfig, config: Config, device: torch.device) -> int:
    """Returns the memory that a library takes for a short run of a task, in bytes.

    On a CPU, in a process of its own: what others have left behind cannot be told from what is taken.
    """
    training = replace(config.training, num_inference_steps=2)
    arguments = kind, task, replace(options, rounds=1, steps_per_turn=1), replace(config, training=training)
    if device.type == "cuda":
        return _taken(*arguments)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_taken, *arguments).result()


def _taken(kind: type[Library], task: str, options: BenchmarkConfig, config: Config) -> int:
    with TemporaryDirectory() as folder, unseen():
        library = kind(Setting(options, config, Path(folder)))
        _ = library.setting.model, library.flops, library.parameters  # which takes memory, too, but not for the task
        with peak_memory(library.setting.device) as peak:
            (work,) = getattr(library, task)()
            for _ in range(1 if work.lead is not None else options.rounds + 1):  # who leads takes all turns in one
                work.run()
            work.close()
            return peak()
