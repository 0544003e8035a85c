"""Edits of picture files: read pictures and masks, edit them in batches, write the results beside a grid."""

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
from hf_ddpm.data.pictures import open_picture
from hf_ddpm.data.scan import image_suffixes, sort_out
from hf_ddpm.data.transforms import ImageFormat, fit
from hf_ddpm.images import check_picture, grid, read_masks, save_picture, to_bytes, to_pil, to_signed, to_unit
from hf_ddpm.models.precision import choose_precision, on_main_process
from hf_ddpm.pipelines.pipeline_ddpm import DDPMPipeline, load_pipeline
from hf_ddpm.provenance import model_checksum, provenance
from hf_ddpm.sampling.generate import in_precision
from hf_ddpm.sampling.options import EditConfig, InpaintConfig, InvertConfig, Sampling, VaryConfig
from hf_ddpm.sampling.samplers import find_scheduler
from hf_ddpm.schedulers.scheduling_ddim import DDIMScheduler
from hf_ddpm.utils.files import atomic_write, is_free, make_folder, one_line, write_text
from hf_ddpm.utils.jsonl import to_json
from hf_ddpm.utils.launch import exclusive, use_own_cores
from hf_ddpm.utils.options import require_value
from hf_ddpm.utils.seeds import SAMPLES, generator

# Pictures in the grid.
SHOWN = 8
GRAY = 128

# Edits signed images: indices of the pictures, images, and options of a call to unit images, and their noise, if any.
Edit = Callable[[list[int], Tensor, dict[str, Any]], tuple[Tensor, Tensor | None]]


def edit_pictures(config: EditConfig, options: InpaintConfig | VaryConfig | InvertConfig) -> Path:
    """Edits pictures into a folder: `hf-ddpm edit`. Every process of a launcher is to call it.

    Args:
        config: Model, pictures and folder.
        options: The edit, by its class, and its options.

    Returns:
        The folder.

    Raises:
        ValueError: If the model, a picture or a mask cannot be used, or an option is not allowed.
        OSError: If a file cannot be written.
    """
    files = find_pictures("images", Path(config.images))
    is_free_name = all(file.stem != "grid" for file in files)
    require_value("images", config.images, is_free_name, "the results of a picture named grid would replace grid.png")
    if isinstance(options, InpaintConfig):
        find_pictures("masks", Path(options.masks))  # before anything that takes long
    state = PartialState(cpu=not torch.cuda.is_available())
    use_own_cores()
    pipe = load_pipeline(config.model, state.device)
    pipe.set_progress_bar_config(desc="Steps", leave=False, disable=not state.is_main_process)
    channels, *size = pipe.image_shape
    check_picture(channels, "edit them in Python, by the methods of the pipeline")
    pixels = read_pictures(files, pipe.image_shape, config.background)
    masks = None
    if isinstance(options, InpaintConfig):
        masks = read_mask_files(Path(options.masks), files, (size[0], size[1]))
    edit = prepared(pipe, options, masks)

    output = Path(config.output)
    state.wait_for_everyone()  # all have seen that it is empty
    make_folder(output, "output")
    with exclusive(output, "output") if state.is_main_process else nullcontext():
        if state.is_main_process:  # another run may have come between
            require_value("output", config.output, is_free(output), "expected a new or empty folder")
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
    """Writes the first pictures before and after as `grid.png`; prints the error of pictures made of their noise."""
    rows = {"picture": pixels}
    if masks is not None:
        rows["masked"] = torch.where(masks, GRAY, pixels)
    if is_inverted:
        noise = np.stack([np.load(output / f"{file.stem}.npy") for file in files[:SHOWN]])
        rows["noise"] = to_bytes(to_unit(torch.from_numpy(noise)))
    rows["result"] = read_pictures([output / f"{file.stem}.png" for file in files], tuple(pixels.shape[1:]))
    save_picture(before_and_after(rows), output / "grid.png")
    if is_inverted:
        error = (rows["result"].float() - pixels.float()).square().mean().sqrt().item()
        print(f"RMSE between the pictures and those made of their noise: {error:.3g}, on the scale [0, 255]")


def edit_batches(
    config: EditConfig,
    edit: Edit,
    files: Sequence[Path],
    pixels: Tensor,
    labels: Sequence[int | str],
    state: PartialState,
) -> None:
    """Edits this process's share of pictures, bytes, and writes each result; returns when all processes have."""
    output, mine = Path(config.output), list(range(len(files)))[state.process_index :: state.num_processes]
    with tqdm(total=len(mine), desc="Pictures", unit="picture", disable=not state.is_main_process) as bar:
        for start in range(0, len(mine), config.batch_size):
            rows = mine[start : start + config.batch_size]
            call = {
                "generator": [generator(config.seed, SAMPLES, row, device=state.device) for row in rows],
                "class_labels": [labels[row % len(labels)] for row in rows] if labels else None,
                "guidance_scale": config.guidance_scale,
            }
            edited, noise = edit(rows, to_signed(pixels[rows]), call)
            for i, (row, picture) in enumerate(zip(rows, to_pil(to_bytes(edited).cpu()), strict=True)):
                save_picture(picture, output / f"{files[row].stem}.png")
                if noise is not None:
                    save_array(noise[i].cpu().numpy(), output / f"{files[row].stem}.npy")
            bar.update(len(rows))
    state.wait_for_everyone()


def prepared(pipe: DDPMPipeline, options: InpaintConfig | VaryConfig | InvertConfig, masks: Tensor | None) -> Edit:
    """Returns an edit, and sets the scheduler for it.

    Raises:
        ValueError: If the model has no such number of steps.
    """
    total = pipe.scheduler.config.num_train_timesteps
    if isinstance(options, InvertConfig):
        steps = options.num_inference_steps
        # Not `trailing`: at T the signal may be so small that a step from there cannot be undone.
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
        pipe.scheduler.set_timesteps(steps)  # refuses before the folder is made

        def invert(rows: list[int], images: Tensor, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
            del call["generator"]  # nothing is random
            noise = pipe.invert(images, steps, num_iterations=options.num_iterations, **call)
            shared = {"num_inference_steps": steps, "output_type": "pt", **call}
            return pipe(len(noise), latents=noise, **shared).images, noise

        return invert
    if isinstance(options, VaryConfig):
        most = max(1, round(options.strength * total))
        chosen = options.num_inference_steps
        allowed = f"at most the {most} steps of strength={options.strength:g}"
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


def find_pictures(option: str, path: Path) -> list[Path]:
    """Returns a file, or the picture files of a folder by name.

    `grid.png`, as `hf-ddpm sample` writes it beside its samples, is left out of a folder.

    Raises:
        ValueError: If there are none, two have the same name, or the folder cannot be read.
    """
    try:
        require_value(option, str(path), path.exists(), "there is no such file or folder")
        if not path.is_dir():
            return [path]
        names, _ = sort_out([file.name for file in path.iterdir() if file.is_file()], image_suffixes())
    except OSError as error:
        raise ValueError(f"{option}={str(path)!r} cannot be read: {error.strerror}") from error
    files = [path / name for name in sorted(names) if name != "grid.png"]
    require_value(option, str(path), bool(files), "there are no pictures in it")
    by_name: dict[str, Path] = {}
    for file in files:
        other = by_name.setdefault(file.stem, file)
        allowed = f"{other.name} and {file.name} have the same name: expected names that differ before the suffix"
        require_value(option, str(path), other is file, allowed)
    return files


def read_pictures(files: Sequence[Path], shape: tuple[int, int, int], background: str = "white") -> Tensor:
    """Returns picture files, resized and cropped to a shape, as bytes; a `ValueError` names a file and its reason."""
    channels, height, width = shape
    images = []
    for file in files:
        pixels = attempt(_row(file), ImageFormat(height, width, channels, background=background))
        if isinstance(pixels, str):
            raise ValueError(f"{file} cannot be used: {pixels}")
        images.append(torch.tensor(pixels))
    return torch.stack(images)


def read_mask_files(path: Path, files: Sequence[Path], size: tuple[int, int]) -> Tensor:
    """Returns the masks of pictures, bool, shape `(len(files), 1, H, W)`.

    A mask may have the size of its picture, too: it is resized and cropped as that is.

    Args:
        path: File of a mask for all, or folder of masks that are named as the pictures, up to the suffix.
        files: The pictures.
        size: Height and width of the masks.

    Raises:
        ValueError: If a mask is missing, cannot be read or has another size; it names the file.
    """
    there = {file.stem: file for file in find_pictures("masks", path)}
    chosen = [path] if path.is_file() else [there.get(file.stem) for file in files]
    masks = []
    for file, picture in zip(chosen, files, strict=False):
        if file is None:
            raise ValueError(f"masks={str(path)!r} is not allowed: there is no mask {picture.stem}.png for {picture}")
        try:
            mask = open_picture(_row(file))
            own_size, masked = (mask.height, mask.width), files if path.is_file() else [picture]
            if own_size != size and all(open_picture(_row(one)).size == mask.size for one in masked):
                read_masks(mask, 1, own_size)  # refuses what is no mask
                mask = Image.fromarray(fit(_row(file), ImageFormat(*size, 1))[0])
            masks.append(read_masks(mask, 1, size))
        except Exception as error:  # decoders raise anything
            raise ValueError(f"{file} cannot be used: {one_line(error)}") from error
    return torch.cat(masks).expand(len(files), 1, *size)


def _row(file: Path) -> dict[str, Any]:
    return {"bytes": None, "path": str(file)}


def save_array(array: np.ndarray, path: Path) -> None:
    """Writes an array, so that a reader of `path` never sees half of it."""
    with atomic_write(path) as partial, partial.open("wb") as file:
        np.save(file, array)


def before_and_after(rows: dict[str, Tensor]) -> Image.Image:
    """Draws the first of several rows of pictures, bytes, below each other."""
    shown = torch.cat([images[:SHOWN] for images in rows.values()])
    return grid(to_pil(shown), len(shown) // len(rows), row_labels=list(rows))
