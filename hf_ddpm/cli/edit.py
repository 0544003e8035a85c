"""Edit images with a model: inpaint, vary, or invert them to noise.

    hf-ddpm edit inpaint --model runs/digits --images photos --masks mask.png --output out
    hf-ddpm edit vary --model org/name --images photo.png --strength 0.4 --output out
    hf-ddpm edit invert --model org/name --images photos --num_inference_steps 250 --output out

The output folder gets one PNG per image, with its name; grid.png, the first images before and after; and edit.json, the
settings. invert also writes the noise of each image as .npy. With accelerate launch, processes share the images.
"""

from hf_ddpm.sampling.options import EditConfig, InpaintConfig, InvertConfig, VaryConfig
from hf_ddpm.utils.options import parse_command

COMMANDS: dict[str, tuple[type, ...]] = {
    "inpaint": (EditConfig, InpaintConfig),
    "vary": (EditConfig, VaryConfig),
    "invert": (EditConfig, InvertConfig),
}


def main(argv: list[str]) -> int:
    """Run the command line; return the exit code."""
    _, (config, options) = parse_command(argv, COMMANDS, doc=__doc__)
    from hf_ddpm.sampling.edits import edit_images  # slow import

    edit_images(config, options)
    return 0
