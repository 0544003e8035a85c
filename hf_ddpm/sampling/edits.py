"""Edit image files in batches, and write the results and a grid for comparison."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from hf_ddpm.data.decoding import attempt
from hf_ddpm.data.pictures import open_image
from hf_ddpm.data.scan import image_suffixes, split_by_suffix
from hf_ddpm.data.transforms import ImageFormat, fit
from hf_ddpm.images import check_picture, grid, read_masks, save_picture, to_bytes, to_pil, to_signed, to_unit
from hf_ddpm.models.precision import choose_precision, on_main_process
from hf_ddpm.pipelines.loading import load_pipeline
from hf_ddpm.pipelines.pipeline_ddpm import DDPMPipeline
from hf_ddpm.provenance import model_checksum, provenance
from hf_ddpm.sampling.generate import in_precision
from hf_ddpm.sampling.options import EditConfig, InpaintConfig, InvertConfig, Sampling, VaryConfig
from hf_ddpm.sampling.samplers import find_scheduler
from hf_ddpm.schedulers.scheduling_ddim import DDIMScheduler
from hf_ddpm.utils.files import atomic_write, check_free, count_of, make_folder, one_line, write_text
from hf_ddpm.utils.jsonl import to_json
from hf_ddpm.utils.launch import exclusive, use_own_cores
from hf_ddpm.utils.options import require_value
from hf_ddpm.utils.seeds import SAMPLES, generator

# Number of images in the grid.
SHOWN = 8
GRAY = 128

# Function from the indices of images, the images in [-1, 1] and call options to edited images in [0, 1] and their noise
# (or None).
Edit = Callable[[list[int], Tensor, dict[str, Any]], tuple[Tensor, Tensor | None]]


def edit_images(config: EditConfig, options: InpaintConfig | VaryConfig | InvertConfig) -> Path:
    """Edit images into a folder, as `hf-ddpm edit` does. Every process of a launcher must call this function.

    Args:
        config: Model, input images and output folder.
        options: Options of the edit; their class selects the kind of edit.

    Returns:
        The output folder.

    Raises:
        ValueError: If the model, an image or a mask is unusable, or an option is invalid.
        OSError: If a file cannot be written.
    """
    files = find_images("images", Path(config.images))
    is_free_name = all(file.stem != "grid" for file in files)
    reason = "the result of the image named grid would replace grid.png; expected another name"
    require_value("images", config.images, is_free_name, reason)
    if isinstance(options, InpaintConfig):
        find_images("masks", Path(options.masks))  # check the masks before anything slow
    state = PartialState(cpu=not torch.cuda.is_available())
    use_own_cores()
    pipe = load_pipeline(config.model, state.device)
    pipe.set_progress_bar_config(desc="Steps", leave=False, disable=not state.is_main_process)
    steps = f"the model was distilled to {pipe.default_steps} steps; expected the model that it was distilled from"
    require_value("model", config.model, not pipe.is_distilled, steps)
    channels, *size = pipe.image_shape
    check_picture(channels, "edit them in Python, with the methods of the pipeline")
    pixels = read_images(files, pipe.image_shape, config.background)
    masks = None
    if isinstance(options, InpaintConfig):
        masks = read_mask_files(Path(options.masks), files, (size[0], size[1]))
        empty = [file.name for file, mask in zip(files, masks, strict=True) if not bool(mask.any())]
        reason = f"no mask has a white pixel at {size[0]}x{size[1]}; expected white (255) where to fill"
        require_value("masks", options.masks, len(empty) < len(files), reason)
        if empty:
            count = count_of(len(empty), "image")
            state.print(f"{count} will not change, because the mask has no white pixel, such as {empty[0]}")
    edit = prepared(pipe, options, masks)

    output = Path(config.output)
    state.wait_for_everyone()  # all processes have checked that the folder is empty
    make_folder(output, "output")
    with exclusive(output, "output") if state.is_main_process else nullcontext():
        if state.is_main_process:  # another run may have written files before the lock
            check_free(output)
        state.wait_for_everyone()
        precision = config.mixed_precision
        if precision == "auto":
            choice = on_main_process(lambda: choose_precision(pipe.unet, pipe.image_shape, config.batch_size))
            state.print(choice.line)
            precision = choice.precision
        with in_precision(pipe, precision):
            edit_batches(config, edit, files, pixels, Sampling(class_labels=config.class_labels).labels(pipe), state)
        if state.is_main_process:
            settings = {**asdict(config), **asdict(options), "mixed_precision": precision}
            origin = {"model_checksum": model_checksum(pipe), **provenance(state.device)}
            record = {"edit": type(options).__name__.removesuffix("Config").lower(), **settings, **origin}
            write_text(output / "edit.json", to_json(record, indent=2) + "\n")
            draw_grid(output, files, pixels, masks, is_inverted=isinstance(options, InvertConfig))
    state.wait_for_everyone()
    return output


def draw_grid(output: Path, files: Sequence[Path], pixels: Tensor, masks: Tensor | None, is_inverted: bool) -> None:
    """Write `grid.png`, the first images before and after; print the reconstruction error of inverted images."""
    rows = {"image": pixels}
    if masks is not None:
        rows["masked"] = torch.where(masks, GRAY, pixels)
    if is_inverted:
        noise = np.stack([np.load(output / f"{file.stem}.npy") for file in files[:SHOWN]])
        rows["noise"] = to_bytes(to_unit(torch.from_numpy(noise)))
    rows["result"] = read_images([output / f"{file.stem}.png" for file in files], tuple(pixels.shape[1:]))
    shown = to_pil(torch.cat([images[:SHOWN] for images in rows.values()]))
    save_picture(grid(shown, len(shown) // len(rows), row_labels=list(rows)), output / "grid.png")
    if is_inverted:
        error = (rows["result"].float() - pixels.float()).square().mean().sqrt().item()
        print(f"RMSE between the images and their reconstructions: {error:.3g}, for pixel values in [0, 255]")


def edit_batches(
    config: EditConfig,
    edit: Edit,
    files: Sequence[Path],
    pixels: Tensor,
    labels: Sequence[int | str],
    state: PartialState,
) -> None:
    """Edit this process's share of the images (uint8) and write the results; return when all processes are done."""
    output, mine = Path(config.output), list(range(len(files)))[state.process_index :: state.num_processes]
    with tqdm(total=len(mine), desc="Images", unit="image", disable=not state.is_main_process) as bar:
        for start in range(0, len(mine), config.batch_size):
            rows = mine[start : start + config.batch_size]
            call = {
                "generator": [generator(config.seed, SAMPLES, row, device=state.device) for row in rows],
                "class_labels": [labels[row % len(labels)] for row in rows] if labels else None,
                "guidance_scale": config.guidance_scale,
            }
            edited, noise = edit(rows, to_signed(pixels[rows]), call)
            for i, (row, image) in enumerate(zip(rows, to_pil(to_bytes(edited).cpu()), strict=True)):
                save_picture(image, output / f"{files[row].stem}.png")
                if noise is not None:
                    with atomic_write(output / f"{files[row].stem}.npy") as partial, partial.open("wb") as file:
                        np.save(file, noise[i].cpu().numpy())
            bar.update(len(rows))
    state.wait_for_everyone()


def prepared(pipe: DDPMPipeline, options: InpaintConfig | VaryConfig | InvertConfig, masks: Tensor | None) -> Edit:
    """Return the function of an edit, and set the pipeline's scheduler for it.

    Raises:
        ValueError: If the number of steps is invalid for the model.
    """
    total = pipe.scheduler.config.num_train_timesteps
    if isinstance(options, InvertConfig):
        steps = options.num_inference_steps
        # Not `trailing`: at T the signal may be too small to invert a step.
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
        pipe.scheduler.set_timesteps(steps)  # raises errors before the folder is created

        def invert(rows: list[int], images: Tensor, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
            del call["generator"]  # inversion is deterministic
            noise = pipe.invert(images, steps, num_iterations=options.num_iterations, **call)
            shared = {"num_inference_steps": steps, "output_type": "pt", **call}
            return pipe(len(noise), latents=noise, **shared).images, noise

        return invert
    if isinstance(options, VaryConfig):
        most = max(1, round(options.strength * total))
        chosen = options.num_inference_steps
        allowed = f"at most the {most} steps of --strength {options.strength:g}"
        require_value("num_inference_steps", chosen, chosen is None or chosen <= most, allowed)
        pipe.scheduler = find_scheduler(pipe, "ddpm", total if chosen in (None, most) else chosen)
        return lambda rows, images, call: (
            pipe.vary(images, options.strength, output_type="pt", num_inference_steps=chosen, **call),
            None,
        )
    steps = options.num_inference_steps or min(250, total)
    pipe.scheduler = find_scheduler(pipe, "ddpm", steps)
    jumps = {"jump_length": options.jump_length, "jump_n_sample": options.jump_n_sample}
    return lambda rows, images, call: (
        pipe.inpaint(images, masks[rows], num_inference_steps=steps, output_type="pt", **jumps, **call).images,
        None,
    )


def find_images(option: str, path: Path) -> list[Path]:
    """Return an image file, or the image files of a folder sorted by name, without `grid.png`.

    Args:
        option: Name of the option, for error messages.
        path: The file or folder.

    Raises:
        ValueError: If the path or the images are missing, two images differ only in their suffix, or the folder cannot
            be read.
    """
    try:
        require_value(option, str(path), path.exists(), "an existing file or folder")
        if not path.is_dir():
            return [path]
        names, _ = split_by_suffix([file.name for file in path.iterdir() if file.is_file()], image_suffixes())
    except OSError as error:
        raise ValueError(f"--{option} {path}: cannot be read: {error.strerror}") from error
    files = [path / name for name in sorted(names) if name != "grid.png"]
    require_value(option, str(path), bool(files), "folder contains no images; expected at least one image file")
    by_name: dict[str, Path] = {}
    for file in files:
        other = by_name.setdefault(file.stem, file)
        allowed = f"{other.name} and {file.name} have the same name; expected names that differ before the suffix"
        require_value(option, str(path), other is file, allowed)
    return files


def read_images(files: Sequence[Path], shape: tuple[int, int, int], background: str = "white") -> Tensor:
    """Return image files resized and cropped to a shape, as uint8; a `ValueError` names the file and the reason."""
    channels, height, width = shape
    images = []
    for file in files:
        pixels = attempt(_row(file), ImageFormat(height, width, channels, background=background))
        if isinstance(pixels, str):
            raise ValueError(f"{file}: image is unusable: {pixels}")
        images.append(torch.tensor(pixels))
    return torch.stack(images)


def read_mask_files(path: Path, files: Sequence[Path], size: tuple[int, int]) -> Tensor:
    """Return the masks of images, bool, shape `(len(files), 1, H, W)`.

    A mask with the size of its image is resized and cropped like the image.

    Args:
        path: File of one mask for all images, or folder of masks with the names of the images, except for the suffix.
        files: The image files.
        size: Height and width of the result.

    Raises:
        ValueError: If a mask is missing, cannot be read, or has neither this size nor its image's; it names the file.
    """
    existing = {file.stem: file for file in find_images("masks", path)}
    chosen = [path] if path.is_file() else [existing.get(file.stem) for file in files]
    masks = []
    for file, image in zip(chosen, files, strict=False):
        if file is None:
            raise ValueError(f"--masks {path}: mask for {image} is missing; expected {image.stem}.png")
        try:
            mask = open_image(_row(file))
            own_size, masked = (mask.height, mask.width), files if path.is_file() else [image]
            if own_size != size and all(open_image(_row(one)).size == mask.size for one in masked):
                read_masks(mask, 1, own_size)  # raises an error for an invalid mask
                mask = Image.fromarray(fit(_row(file), ImageFormat(*size, 1))[0])
            masks.append(read_masks(mask, 1, size))
        except Exception as error:  # decoders raise anything
            raise ValueError(f"{file}: mask is unusable: {one_line(error)}") from error
    return torch.cat(masks).expand(len(files), 1, *size)


def _row(file: Path) -> dict[str, Any]:
    return {"bytes": None, "path": str(file)}
