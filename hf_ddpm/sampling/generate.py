"""Sample many images; image `i` of a seed is the same for any batch size and number of processes."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_ddpm.images import check_picture, to_bytes
from hf_ddpm.models.precision import PRECISION_NAMES, Choice, cast_copy, choose_precision, on_main_process
from hf_ddpm.pipelines.loading import load_pipeline
from hf_ddpm.pipelines.pipeline_ddpm import DDPMPipeline
from hf_ddpm.provenance import model_checksum
from hf_ddpm.sampling.folder import SampleFolder
from hf_ddpm.sampling.options import SampleConfig, Sampling
from hf_ddpm.sampling.samplers import VERSION, find_scheduler, is_changed, replaced_variance
from hf_ddpm.utils.files import make_folder
from hf_ddpm.utils.launch import exclusive, use_own_cores
from hf_ddpm.utils.options import require_value
from hf_ddpm.utils.seeds import SAMPLES, generator


def compile_for_sampling(unet: nn.Module) -> None:
    """Compile a network in place for inference with one batch size; its weights must not change afterwards.

    The weights become constants of the compiled code, in the memory layout of its kernels. A forward pass is a CUDA
    graph on a GPU, and one call of C++ code on a CPU.
    """
    from torch._inductor import config  # slow to import

    config.freezing = True  # set globally, as the tracer ignores it as an option of `compile`
    on_cpu = next(unet.parameters()).device.type == "cpu"
    unet.compile(dynamic=False, options={"cpp_wrapper": True} if on_cpu else {"triton.cudagraphs": True})


def cast_for_sampling(unet: Any, precision: str) -> Any:
    """Return a copy of a network in `bf16` or `fp16`, compiled if the network is.

    For `no`, or if the weights are already in half precision, return the network itself.
    """
    if precision == "no" or unet.dtype != torch.float32:
        return unet
    half = cast_copy(unet, precision)
    if is_compiled(unet):
        compile_for_sampling(half)
    return half


@contextmanager
def in_precision(pipe: DDPMPipeline, precision: str) -> Iterator[None]:
    """Use a pipeline's network in another precision during a `with` block, see `cast_for_sampling`."""
    own = pipe.unet
    pipe.unet = cast_for_sampling(own, precision)
    try:
        yield
    finally:
        pipe.unet = own


def is_compiled(unet: nn.Module) -> bool:
    """Return whether a network was compiled in place."""
    return getattr(unet, "_compiled_call_impl", None) is not None


def sampling_settings(pipe: DDPMPipeline, sampling: Sampling, model: str, device: torch.device) -> dict[str, Any]:
    """Return the settings that determine the images of a pipeline, for a `SampleFolder`."""
    replaced = replaced_variance(pipe, sampling)
    return {
        "model": model,
        "model_checksum": model_checksum(pipe),
        "shape": list(pipe.image_shape),
        "device": device.type,  # other kinds of devices draw other noise
        **{name: value for name, value in asdict(sampling).items() if name != "variance"},
        "num_inference_steps": sampling.steps(pipe),
        **({} if replaced is None else {"variance": replaced}),
        **({"sampler_version": VERSION} if is_changed(pipe, sampling) else {}),
    }


def resolve_precision(
    pipe: DDPMPipeline,
    sampling: Sampling,
    batch_size: int,
    folder_of: Callable[[Sampling], Path],
    log: Callable[[str], object] = lambda line: None,
    compile: bool = False,
) -> Sampling:
    """Replace the precision `auto` by a measured choice. Every process must call this function.

    Args:
        pipe: The pipeline, on its device, not compiled.
        sampling: The sampling options; a precision other than `auto` is kept.
        batch_size: Batch size.
        folder_of: Function that returns the output folder for sampling options. If a folder already contains images,
            their precision is chosen.
        log: Called with a line about the choice.
        compile: If true, the network will be compiled.

    Returns:
        The sampling options with the precision.
    """
    if sampling.mixed_precision != "auto":
        return sampling
    shape = pipe.image_shape
    paths = {precision: folder_of(replace(sampling, mixed_precision=precision)) for precision in PRECISION_NAMES}

    def choose() -> Choice:
        for precision, path in paths.items():
            if SampleFolder(path, {"shape": shape}).stored_precision == precision:
                return Choice(precision, f"precision {PRECISION_NAMES[precision]}, like the existing images in {path}")
        return choose_precision(pipe.unet, shape, batch_size, compiled=compile)

    choice = on_main_process(choose)
    log(choice.line)
    return replace(sampling, mixed_precision=choice.precision)


def folder_name(pipe: DDPMPipeline, sampling: Sampling, device: torch.device) -> str:
    """Return a folder name that is unique for the settings of the images."""
    settings = json.dumps(sampling_settings(pipe, sampling, "", device), sort_keys=True)
    return hashlib.sha256(settings.encode()).hexdigest()[:12]


def sample_images(
    model: Path | str,
    output: Path | str,
    num_images: int = 64,
    sampling: Sampling | None = None,
    *,
    format: str = "png",
    batch_size: int = 64,
    compile: bool = False,
) -> Path:
    """Sample images of a model into a folder, like the command `hf-ddpm sample`.

    The same call resumes after an interruption, also with a larger `num_images`. Every process of a launcher must call
    this function.

    Args:
        model: Folder or Hub id of a DDPM pipeline (hf_ddpm or diffusers).
        output: Output folder for `00000.png`, ... or `samples.npz`, and `grid.png` with the first 64 images.
        num_images: Number of images, at least 1.
        sampling: Seed, steps, sampler and classes; by default seed 0 and all steps of the model's own sampler.
        format: `png` for one file per image, `npz` for one array of all images.
        batch_size: Batch size per process; values above 256 act like 256.
        compile: If true, compile the network first, which is faster for many images.

    Returns:
        The output folder.

    Raises:
        ValueError: If the model cannot be loaded, an argument is invalid, or the folder contains images of other
            settings.
        OSError: If a file cannot be written.
    """
    config = SampleConfig(model, output, num_images, format, batch_size, compile)
    if not isinstance(sampling, Sampling | None):
        raise ValueError(f"sampling={sampling!r}: expected hf_ddpm.Sampling(...)")
    make_folder(Path(config.output), "output")
    state = PartialState(cpu=not torch.cuda.is_available())
    use_own_cores()
    pipe = load_pipeline(config.model, state.device)
    if config.format == "png":
        check_picture(pipe.image_shape[0], "use --format npz to write them as an array")
    path = Path(config.output)
    sampling = resolve_precision(
        pipe, sampling or Sampling(), config.batch_size, lambda _: path, state.print, config.compile
    )
    if config.compile:
        compile_for_sampling(pipe.unet)
    pipe.set_progress_bar_config(desc="Steps", leave=False, disable=not state.is_main_process)
    folder = fill_folder(
        pipe,
        path,
        config.num_images,
        sampling,
        model=config.model,
        batch_size=config.batch_size,
        state=state,
    )
    if config.format == "png":
        folder.write_images(range(config.num_images)[state.process_index :: state.num_processes])
    if state.is_main_process:
        if config.format == "npz":
            folder.write_npz(config.num_images)
        folder.write_grid(config.num_images)
    state.wait_for_everyone()
    return folder.path


def generate_images(
    pipe: DDPMPipeline,
    ids: Sequence[int],
    sampling: Sampling,
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
    **call: Any,
) -> Iterator[tuple[int, Tensor]]:
    """Generate images by index; the scheduler of the pipeline is restored afterwards.

    Args:
        pipe: The pipeline, on `device`.
        ids: Indices of the images, at least 0.
        sampling: The sampling options, which determine image i.
        batch_size: Batch size.
        device: Device where noise is drawn; other kinds of devices draw other numbers.
        call: Further arguments of the pipeline's call, such as `callback_on_step_end`.

    Yields:
        Pairs of index and image; images are uint8, shape `(C, H, W)`, on the CPU.

    Raises:
        ValueError: If the scheduler does not support the number of steps.
    """
    scheduler = find_scheduler(pipe, sampling.scheduler, sampling.steps(pipe), sampling.variance)
    labels, precision = sampling.labels(pipe), sampling.mixed_precision
    if precision == "auto":
        choice = choose_precision(pipe.unet, pipe.image_shape, batch_size, compiled=is_compiled(pipe.unet))
        precision = choice.precision
    own_scheduler = pipe.scheduler
    pipe.scheduler = scheduler
    try:
        with in_precision(pipe, precision):
            for start in range(0, len(ids), batch_size):
                chunk = ids[start : start + batch_size]
                filled = _filled(pipe.unet, chunk)
                unit = pipe(
                    batch_size=len(filled),
                    generator=[generator(sampling.seed, SAMPLES, i, device=device) for i in filled],
                    num_inference_steps=sampling.steps(pipe),
                    output_type="pt",
                    eta=sampling.eta,
                    class_labels=[labels[i % len(labels)] for i in filled] if labels else None,
                    guidance_scale=sampling.guidance_scale,
                    **call,
                ).images
                yield from zip(chunk, to_bytes(unit[: len(chunk)]).cpu(), strict=True)
    finally:
        pipe.scheduler = own_scheduler


def _filled(unet: nn.Module, chunk: Sequence[int]) -> list[int]:
    """Pad a batch to the largest batch size so far for a compiled network, by repeating the last image."""
    if not is_compiled(unet):
        return list(chunk)
    unet.compiled_batch = max(len(chunk), getattr(unet, "compiled_batch", 0))
    return [*chunk, *[chunk[-1]] * (unet.compiled_batch - len(chunk))]


def fill_folder(
    pipe: DDPMPipeline,
    path: Path,
    num_images: int,
    sampling: Sampling,
    *,
    model: str,
    batch_size: int,
    state: PartialState | Accelerator,
) -> SampleFolder:
    """Generate the missing images of a folder. Every process must call this function.

    Args:
        pipe: The pipeline, on the device of this process.
        path: The folder.
        num_images: Number of images that the folder contains afterwards.
        sampling: The sampling options.
        model: Folder or Hub id of the pipeline, stored in `sampling.json`.
        batch_size: Batch size per process; values above the size of a shard act like it.
        state: State of the processes.

    Returns:
        The folder with all images.

    Raises:
        ValueError: If the folder contains images sampled with other settings or is in use, or an argument is invalid.
        OSError: If images of other processes are missing because the folder is not shared.
    """
    # Raises errors before the folder is changed.
    find_scheduler(pipe, sampling.scheduler, sampling.steps(pipe), sampling.variance)
    sampling = resolve_precision(pipe, sampling, batch_size, lambda _: path)
    _check_space(path, num_images, math.prod(pipe.image_shape))
    folder = SampleFolder(path, sampling_settings(pipe, sampling, model, state.device))
    folder.check(ignored=["model"])
    state.wait_for_everyone()
    path.mkdir(parents=True, exist_ok=True)
    with exclusive(path, "output") if state.is_main_process else nullcontext():
        if state.is_main_process:
            folder.check(ignored=["model"])  # again, as another run may have changed it before the lock
            folder.bind()
        state.wait_for_everyone()
        parts = folder.missing(num_images)
        state.wait_for_everyone()  # all processes compute the same list before images are added
        mine = parts[state.process_index :: state.num_processes]
        total = sum(map(len, mine))
        with (
            tqdm(total=total, desc="Images", unit="image", disable=not (state.is_main_process and total)) as bar,
            in_precision(pipe, sampling.mixed_precision),
        ):
            for indices in mine:
                images = []
                for _, image in generate_images(pipe, indices, sampling, batch_size=batch_size, device=state.device):
                    images.append(image)
                    bar.update()
                folder.add(indices, torch.stack(images))
        state.wait_for_everyone()
    if folder.missing(num_images):
        raise OSError(f"{path}: images of other processes are missing; expected a folder that all machines share")
    return folder


def _check_space(path: Path, num_images: int, image_bytes: int) -> None:
    """Raise a `ValueError` if the images are larger than the disk of the folder."""
    parent = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    size, total = num_images * image_bytes, shutil.disk_usage(parent).total
    sizes = f"{size / 2**30:,.0f} GiB", f"{total / 2**30:,.0f} GiB"
    allowed = f"the images need {sizes[0]}; expected at most {sizes[1]}, the size of the disk of {path}"
    require_value("num_images", num_images, size <= total, allowed)
