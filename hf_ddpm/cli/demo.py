"""Open a demo of a model in the browser.

    hf-ddpm demo --model runs/digits
    hf-ddpm demo --model runs/digits --distilled runs/digits-4

In a Space, the environment variables MODEL_ID and DISTILLED_MODEL_ID set the models. Image i of a seed is the same as
in `hf-ddpm sample`.
"""

import os
from dataclasses import dataclass
from typing import Literal

from hf_ddpm.utils.options import option, parse_options, require_color


@dataclass
class DemoConfig:
    """Demo."""

    model: str | None = option(
        "folder of a model, a run or a checkpoint, or a Hub id (default: the environment variable MODEL_ID)", None
    )
    distilled: str | None = option(
        "folder or Hub id of a model distilled from --model, to compare both (default: the environment variable "
        "DISTILLED_MODEL_ID)",
        None,
    )
    background: str = option("color behind transparent pixels of uploaded images", "white")
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = option(
        "precision of the network; auto: bf16 if the device supports it and is faster with it, else no, which is "
        "float32",
        "auto",
    )

    def __post_init__(self) -> None:
        """Take the model from the environment if it is not given, and check the values."""
        require_color(self, "background")
        self.model = self.model or os.environ.get("MODEL_ID")
        self.distilled = self.distilled or os.environ.get("DISTILLED_MODEL_ID")
        if not self.model:
            raise ValueError("--model is missing: expected a folder or Hub id, or the environment variable MODEL_ID")


def main(argv: list[str]) -> int:
    """Run the command line; return the exit code."""
    (config,) = parse_options(argv, DemoConfig, doc=__doc__)
    from hf_ddpm.demo.app import show  # slow import

    show(config.model, config.background, config.mixed_precision, config.distilled)
    return 0
