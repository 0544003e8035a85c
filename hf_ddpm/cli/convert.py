r"""Convert checkpoints of other packages to the diffusers format.

    hf-ddpm convert --from ho2020 --input diffusion_cifar10.npz --output cifar10
    hf-ddpm convert --from improved-diffusion --input cifar10_uncond_50M_500K.pt --output cifar10 \
        --num_train_timesteps 4000 --beta_schedule squaredcos_cap_v2
    hf-ddpm convert --from stock --input google/ddpm-cifar10-32 --output cifar10

`ho2020`: original TensorFlow checkpoints as `.npz` (hf_ddpm/hub/convert/ho2020.py describes how to make one), or those
of their PyTorch port. `improved-diffusion`: checkpoints of improved-diffusion or guided-diffusion. `stock`: a diffusers
model, as folder or Hub id. A missing, unknown or misshaped tensor is an error. `--dry_run` lists the new name of each
tensor and writes nothing.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hf_ddpm.hub.convert.hints import Hints
from hf_ddpm.utils.files import check_free
from hf_ddpm.utils.options import option, parse_options

if TYPE_CHECKING:
    from hf_ddpm.hub.convert.conversion import Conversion


@dataclass
class ConvertConfig:
    """Files: the checkpoint and the folder of the pipeline."""

    layout: Literal["ho2020", "improved-diffusion", "stock"] = option("format of the checkpoint", flag="from")
    input: str = option("file of the checkpoint; with --from stock a folder or Hub id")
    output: str = option("new or empty folder for the pipeline")
    dry_run: bool = option("list the new name of each tensor and exit", False)


def plan(config: ConvertConfig, hints: Hints) -> "Conversion":
    """Return the conversion for the options of a command line."""
    from hf_ddpm.hub.convert import ho2020, improved_diffusion, stock  # slow import
    from hf_ddpm.hub.convert.conversion import read_weights

    hints.check(config.layout)  # before reading the file, which may take minutes
    if config.layout == "stock":
        return stock.plan(config.input, hints)
    weights = read_weights(Path(config.input))
    return (ho2020 if config.layout == "ho2020" else improved_diffusion).plan(weights, hints)


def main(argv: list[str]) -> int:
    """Run the command line; return the exit code."""
    config, hints = parse_options(argv, ConvertConfig, Hints, doc=__doc__)
    from hf_ddpm.hub.convert.conversion import write_pipeline  # slow import

    output = Path(config.output)
    check_free(output)
    conversion = plan(config, hints)
    notes = conversion.describe() if config.dry_run else conversion.notes
    print(*notes, *hints.assumptions(config.layout), sep="\n")
    conversion.fill()
    count = conversion.pipe.unet.num_parameters()
    print(f"{count:,} parameters in {len(conversion.entries)} tensors: all names, shapes and values are valid")
    if not config.dry_run:
        write_pipeline(conversion.pipe, output)
        print(f"pipeline saved; load it with DDPMPipeline.from_pretrained({str(output)!r})")
    return 0
