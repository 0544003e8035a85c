r"""Converts checkpoints of others to the format of diffusers.

    python scripts/convert.py --from ho2020 --input diffusion_cifar10.npz --output cifar10
    python scripts/convert.py --from improved-diffusion --input cifar10_uncond_50M_500K.pt --output cifar10 \
        --num_train_timesteps 4000 --beta_schedule squaredcos_cap_v2
    python scripts/convert.py --from stock --input google/ddpm-cifar10-32 --output cifar10

`ho2020` takes the original checkpoints of TensorFlow as `.npz` (hf_ddpm/hub/convert/ho2020.py says how to make it) and
those of their port to PyTorch; `improved-diffusion` those of guided-diffusion, too; `stock` a folder or Hub id. A file
with a missing, unknown or misshaped tensor is refused. `--dry_run` lists what would become what, and writes nothing.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hf_ddpm.hub.convert import ho2020, improved_diffusion, stock
from hf_ddpm.hub.convert.conversion import Conversion, check_free, read_weights, write_pipeline
from hf_ddpm.hub.convert.hints import Hints
from hf_ddpm.utils.options import option, parse_options


@dataclass
class ConvertConfig:
    """What, and where to."""

    layout: Literal["ho2020", "improved-diffusion", "stock"] = field(
        metadata={"help": "whose checkpoint it is", "aliases": "--from"}
    )
    input: str = option("file of the checkpoint; stock: folder or Hub id")
    output: str = option("folder of the pipeline, new or empty")
    dry_run: bool = option("whether to list what would become what, and stop", False)


def plan(config: ConvertConfig, hints: Hints) -> Conversion:
    """Returns the conversion that was asked for."""
    hints.check(config.layout)  # before a file is read for minutes
    if config.layout == "stock":
        return stock.plan(config.input, hints)
    weights = read_weights(Path(config.input))
    return (ho2020 if config.layout == "ho2020" else improved_diffusion).plan(weights, hints)


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit code."""
    config, hints = parse_options(argv, ConvertConfig, Hints)
    output = Path(config.output)
    check_free(output)
    conversion = plan(config, hints)
    notes = conversion.describe() if config.dry_run else conversion.notes
    print(*notes, *hints.assumptions(config.layout), sep="\n")
    conversion.fill()
    count = conversion.pipe.unet.num_parameters()
    print(f"{count:,} parameters in {len(conversion.entries)} tensors: names, shapes and values are complete")
    if not config.dry_run:
        write_pipeline(conversion.pipe, output)
        print(f"DDPMPipeline.from_pretrained({str(output)!r}) loads")
    return 0
