r"""Convert the checkpoints of other packages to the format of diffusers.

    hf-ddpm convert --from ho2020 --input diffusion_cifar10.npz --output cifar10
    hf-ddpm convert --from improved-diffusion --input cifar10_uncond_50M_500K.pt --output cifar10 \
        --num_train_timesteps 4000 --beta_schedule squaredcos_cap_v2
    hf-ddpm convert --from stock --input google/ddpm-cifar10-32 --output cifar10

`ho2020` takes the original checkpoints of TensorFlow as `.npz` (hf_ddpm/hub/convert/ho2020.py says how to make it) and
those of their port to PyTorch; `improved-diffusion` those of guided-diffusion, too; `stock` a folder or Hub id. A file
with a missing, unknown or misshaped tensor is refused. `--dry_run` lists what would become what, and writes nothing.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hf_ddpm.hub.convert.hints import Hints
from hf_ddpm.utils.options import option, parse_options

if TYPE_CHECKING:
    from hf_ddpm.hub.convert.conversion import Conversion


@dataclass
class ConvertConfig:
    """Files: the checkpoint, and the folder of the pipeline."""

    layout: Literal["ho2020", "improved-diffusion", "stock"] = option("kind of the checkpoint", flag="from")
    input: str = option("file of the checkpoint; stock: folder or Hub id")
    output: str = option("folder of the pipeline, new or empty")
    dry_run: bool = option("list what would become what, and stop", False)


def plan(config: ConvertConfig, hints: Hints) -> "Conversion":
    """Return the conversion that was asked for."""
    from hf_ddpm.hub.convert import ho2020, improved_diffusion, stock  # takes seconds
    from hf_ddpm.hub.convert.conversion import read_weights

    hints.check(config.layout)  # before a file is read for minutes
    if config.layout == "stock":
        return stock.plan(config.input, hints)
    weights = read_weights(Path(config.input))
    return (ho2020 if config.layout == "ho2020" else improved_diffusion).plan(weights, hints)


def main(argv: list[str]) -> int:
    """Run the command line; return the exit code."""
    config, hints = parse_options(argv, ConvertConfig, Hints, doc=__doc__)
    from hf_ddpm.hub.convert.conversion import check_free, write_pipeline  # takes seconds

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
