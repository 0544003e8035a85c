"""List the presets of `hf-ddpm train`.

    hf-ddpm presets

The head of each file, in hf_ddpm/presets, has the paper's table, hardware, images seen and the expected metric.
"""

import re
from dataclasses import dataclass

from hf_ddpm.config import parse_config, preset_names, preset_path
from hf_ddpm.utils.options import parse_options


@dataclass
class PresetsConfig:
    """None but --help."""


def main(argv: list[str]) -> int:
    """Run the command line; return the exit code."""
    parse_options(argv, PresetsConfig, doc=__doc__)
    for name in preset_names():
        config, text = parse_config(["--preset", name]), preset_path(name).read_text(encoding="utf-8")
        size, parameters = "x".join(map(str, config.data.size)), re.findall(r"[\d.]+M parameters", text)[0]
        steps = f"{config.training.max_train_steps:,} steps of {config.training.train_batch_size} images"
        print(f"{name:24}{config.data.dataset} at {size}, {parameters}, {steps}")
    return 0
