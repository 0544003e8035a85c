"""Show a model in the browser: its images appear out of noise.

    hf-ddpm demo --model runs/digits

In a Space, the variable MODEL_ID names the model. Image i of a seed is that of `hf-ddpm sample`.
"""

import os
from dataclasses import dataclass
from typing import Literal

from hf_ddpm.utils.options import option, parse_options


@dataclass
class DemoConfig:
    """Demo."""

    model: str | None = option("folder or Hub id of a DDPM pipeline; the variable MODEL_ID by default", None)
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = option(
        "precision of the network's passes; auto: bf16 if the device has it and is faster with it, else no (float32)",
        "auto",
    )

    def __post_init__(self) -> None:
        """Find the model."""
        self.model = self.model or os.environ.get("MODEL_ID")
        if self.model is None:
            raise ValueError("the following arguments are required: --model")


def main(argv: list[str]) -> int:
    """Run the command line; return the exit code."""
    (config,) = parse_options(argv, DemoConfig, doc=__doc__)
    from hf_ddpm.demo.app import show  # takes seconds

    show(config.model, config.mixed_precision)
    return 0
