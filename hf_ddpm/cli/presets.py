"""List the presets of `hf-ddpm train`: network, memory and length.

    hf-ddpm presets
    hf-ddpm presets --measure true

Memory is for training in float32 at the preset's batch size on a CPU, as counted by --dry_run. Smaller batches need
less (--train_batch_size auto). --measure trains each preset on a few images, which takes minutes on a CPU.
The comments at the top of each file in hf_ddpm/presets list the paper's table, the hardware, the images seen and the
expected metric.
"""

import re
import time
from dataclasses import dataclass

from hf_ddpm.config import Config, parse_config
from hf_ddpm.presets import preset_names, preset_path
from hf_ddpm.utils.options import Auto, option, parse_options

ROW = "{:24}{:>11}{:>12}{:>12}{:>10}  {}"
# Number of pixels in a measured forward pass: 8 images at 32x32.
MEASURED_PIXELS = 8 * 32 * 32


@dataclass
class PresetsConfig:
    """Presets: the columns of the list."""

    measure: bool = option("also measure the time per step on this machine", False)


def main(argv: list[str]) -> int:
    """Run the command line; return the exit code."""
    (options,) = parse_options(argv, PresetsConfig, doc=__doc__)
    print(ROW.format("preset", "resolution", "parameters", "batch size", "memory", "steps"))
    heads = {name: preset_path(name).read_text(encoding="utf-8") for name in preset_names()}
    sizes = {name: float(re.findall(r"([\d.]+)M parameters", text)[0]) for name, text in heads.items()}
    for name in sorted(sizes, key=lambda name: sizes[name]):
        config, parameters = preset_config(name), f"{sizes[name]:g}M"
        memory = re.findall(r"Memory: ([\d.]+ GiB)", heads[name])[0]
        size, training = "x".join(map(str, config.data.size)), config.training
        steps = "auto" if isinstance(training.max_train_steps, Auto) else f"{training.max_train_steps:,}"
        measured = f", {seconds_per_step(config):,.2f} s per step" if options.measure else ""
        print(ROW.format(name, size, parameters, training.train_batch_size, memory, steps + measured), flush=True)
    return 0


def preset_config(name: str) -> Config:
    """Return the options of a preset; a preset without a dataset gets the name of one that does not exist."""
    has_data = re.search("^dataset:", preset_path(name).read_text(encoding="utf-8"), re.MULTILINE)
    return parse_config(["--preset", name, *([] if has_data else ["--dataset", "images"])])


def seconds_per_step(config: Config) -> float:
    """Return the seconds per training step on this machine, extrapolated from a step with few images."""
    import torch

    from hf_ddpm.models.unet_2d import UNet2DModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch, (height, width) = config.training.train_batch_size, config.data.size
    few = max(1, min(batch, MEASURED_PIXELS // (height * width)))
    unet = UNet2DModel(**config.unet()).to(device).train()
    unet.lay_out_kernels()
    images = torch.zeros(few, config.data.channels, height, width, device=device)
    for _ in range(2):  # the first pass is slower
        start = time.perf_counter()
        unet(images, 0).sample.square().mean().backward()
        if device == "cuda":
            torch.cuda.synchronize()
    return (time.perf_counter() - start) * batch / few
