"""Conversion of `.pt` checkpoints of openai/improved-diffusion (Nichol & Dhariwal 2021) and openai/guided-diffusion.

Not supported by our U-Net, and rejected with an error:

- attention heads of different sizes (`num_heads` above 1 with attention at different widths),
- resampling residual blocks without attention at every resolution (`resblock_updown`),
- resampling without a convolution (`conv_resample=False`),
- 3x3 convolutions in the skip connections (`use_conv=True`),
- different channels in the first resolution and the input of the timestep embedding (`channel_mult[0]` other than 1),
- super-resolution networks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from hf_ddpm.config import block_types
from hf_ddpm.diffusion.gaussian import GaussianDiffusion
from hf_ddpm.diffusion.schedules import beta_schedule
from hf_ddpm.hub.convert.conversion import (
    Conversion,
    Entry,
    Place,
    as_tensors,
    empty_unet,
    layer_shape,
    place_of,
    unchanged,
)
from hf_ddpm.hub.convert.hints import Hints
from hf_ddpm.pipelines.pipeline_ddpm import DDPMPipeline
from hf_ddpm.schedulers.scheduling_ddpm import DDPMScheduler
from hf_ddpm.utils.options import require

OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
LAYERS = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
    "group_norm": "norm", "to_q": "qkv", "to_k": "qkv", "to_v": "qkv", "to_out.0": "proj_out",
}  # fmt: skip

# Channel multipliers that create_model uses for each image size.
IMAGE_SIZES = {(1, 2, 2, 2): 32, (1, 2, 3, 4): 64, (1, 1, 2, 3, 4): 128, (1, 1, 2, 2, 4, 4): 256}
SCALE = 1000  # rescale_timesteps maps all steps to [0, 1000)


@dataclass(frozen=True)
class Structure:
    """Structure of a network, which determines the indices in its names.

    Args:
        layers: Residual blocks per resolution in the down path; the up path has one more.
        widths: Channels per resolution, highest resolution first.
        attends: True for resolutions with attention.
    """

    layers: int
    widths: tuple[int, ...]
    attends: list[bool]

    @property
    def attended(self) -> list[int]:
        """The distinct numbers of channels at resolutions with attention, including the middle block."""
        at = [width for width, attends in zip(self.widths, self.attends, strict=True) if attends]
        return sorted({*at, self.widths[-1]})

    def name(self, ours: str) -> str:
        """Return the file's name for a parameter of our network."""
        path, leaf = ours.rsplit(".", 1)
        place = place_of(path)
        if place is None:
            return f"{OUTSIDE[path]}.{leaf}"
        if place.layer == "conv":
            layer = "op" if place.kind == "downsamplers" else "conv"
        else:
            layer = LAYERS[place.layer]
        return f"{self._block(place)}.{layer}.{leaf}"

    def _block(self, place: Place) -> str:
        period = self.layers + 1
        if place.stage == "mid":
            return f"middle_block.{1 if place.kind == 'attentions' else 2 * place.number}"
        if place.stage == "down":
            if place.kind == "downsamplers":
                return f"input_blocks.{(place.index + 1) * period}.0"
            return f"input_blocks.{1 + place.index * period + place.number}.{int(place.kind == 'attentions')}"
        if place.kind == "upsamplers":
            attends = self.attends[len(self.attends) - 1 - place.index]
            return f"output_blocks.{(place.index + 1) * period - 1}.{1 + attends}"
        return f"output_blocks.{place.index * period + place.number}.{int(place.kind == 'attentions')}"


def plan(weights: Mapping[str, Any], hints: Hints) -> Conversion:
    """Plan the conversion of a checkpoint.

    The numbers of resolutions, blocks, channels and classes, the attention, `use_scale_shift_norm`, `resblock_updown`
    and `learn_sigma` are inferred from names and shapes, the image size from the channels. The number of attention
    heads is not stored in the file; the default is 4, as in the repositories.

    With `rescale_timesteps` and T above 1000, only every (T / 1000)th step is kept: only these are integers on the
    network's scale [0, 1000), and diffusers passes only integers.

    Args:
        weights: Arrays or tensors by name.
        hints: Settings that the file does not contain.

    Returns:
        The plan; the weights may still lack tensors.

    Raises:
        ValueError: If the checkpoint has another layout or unsupported layers, or a hint does not fit.
    """
    hints.check("improved-diffusion")
    tensors, notes = as_tensors(weights), list[str]()
    structure = _structure(tensors)
    heads = _heads(structure, hints, notes)
    options = _architecture(tensors, structure, heads)
    options["sample_size"] = hints.resolution or _image_size(structure, notes)
    unet = empty_unet(**options)
    hints.check_resolution(unet.size_multiple)
    is_new = bool(hints.use_new_attention_order)
    entries = [Entry(ours, structure.name(ours), _reader(ours, heads, is_new)) for ours in unet.state_dict()]
    return Conversion(DDPMPipeline(unet, _scheduler(options, hints, notes)), tensors, entries, notes=notes)


def _structure(tensors: Mapping[str, Tensor]) -> Structure:
    """Return the structure, inferred from the names."""
    layer_shape(tensors, "input_blocks.0.0.weight")
    ups = _indices(tensors, "output_blocks")
    if not ups:
        raise ValueError("output_blocks are missing: a classifier, or not an improved-diffusion checkpoint")
    if _indices(tensors, "input_blocks") != list(range(len(ups))):
        raise ValueError("resampling without a convolution (conv_resample=False) is not supported")
    # Every resolution except the highest ends with an upsampler, after a residual block and possibly attention.
    parts = [f"output_blocks.{n}.{i}.{part}.weight" for n in ups for i in (1, 2) for part in ("conv", "in_layers.2")]
    ends = [int(name.split(".")[1]) for name in parts if name in tensors]
    layers = ends[0] if ends else len(ups) - 1
    starts = range(1, len(ups), layers + 1)
    return Structure(
        layers,
        tuple(layer_shape(tensors, f"input_blocks.{start}.0.out_layers.3.weight")[0] for start in starts),
        [f"input_blocks.{start}.1.qkv.weight" in tensors for start in starts],
    )


def _indices(tensors: Mapping[str, Tensor], blocks: str) -> list[int]:
    names = [name.split(".") for name in tensors if name.startswith(f"{blocks}.")]
    return sorted({int(parts[1]) for parts in names if parts[1].isdigit()})


def _architecture(tensors: Mapping[str, Tensor], structure: Structure, heads: Callable[[int], int]) -> dict[str, Any]:
    """Return the options of the network except the image size."""
    shape, widths = partial(layer_shape, tensors), structure.widths
    if {shape("input_blocks.0.0.weight")[0], shape("time_embed.0.weight", 2)[1]} != {widths[0]}:
        raise ValueError(
            "different channels in the first resolution and model_channels (channel_mult[0] != 1) are not supported"
        )
    if any(name.endswith("skip_connection.weight") and value.shape[2:] == (3, 3) for name, value in tensors.items()):
        raise ValueError("3x3 convolutions in the skip connections (use_conv=True) are not supported")
    channels = shape("input_blocks.0.0.weight")[1]
    if channels not in (1, 3, 4):
        raise ValueError(
            f"{channels} input channels are not supported, nor are super-resolution networks; expected 1, 3 or 4"
        )
    resampling = "conv"
    if f"input_blocks.{structure.layers + 1}.0.in_layers.2.weight" in tensors:
        resampling = "resnet"
        if not all(structure.attends):
            raise ValueError("resblock_updown is only supported with attention at every resolution")
    sizes = {width // heads(width) for width in structure.attended}
    is_scaled = shape("input_blocks.1.0.emb_layers.1.weight", 2)[0] == 2 * widths[0]
    return {
        "in_channels": channels,
        "out_channels": shape("out.2.weight")[0],
        "block_out_channels": widths,
        **block_types(structure.attends),
        "layers_per_block": structure.layers,
        "attention_head_dim": sizes.pop() if len(sizes) == 1 else None,
        "downsample_padding": 1,
        "downsample_type": resampling,
        "upsample_type": resampling,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "norm_num_groups": 32,
        "attn_norm_num_groups": 32,
        "norm_eps": 1e-5,
        "resnet_time_scale_shift": "scale_shift" if is_scaled else "default",
        "num_class_embeds": shape("label_emb.weight", 2)[0] if "label_emb.weight" in tensors else None,
    }


def _heads(structure: Structure, hints: Hints, notes: list[str]) -> Callable[[int], int]:
    """Return the number of attention heads as a function of channels."""
    count, size = hints.num_heads, hints.num_head_channels
    is_unique = count is None or size is None
    require(hints, "num_head_channels", is_unique, "cannot be combined with --num_heads; expected only one of them")
    widths = structure.attended
    if size is not None:
        require(hints, "num_head_channels", all(w % size == 0 for w in widths), f"a divisor of {widths}")
        return lambda width: width // size
    if count is None:
        count = 4
        notes.append("heads: 4, the default of the repositories (override with --num_heads)")
    if any(width % count for width in widths):
        raise ValueError(f"--num_heads {count}: expected a divisor of {widths}")
    if count > 1 and len(widths) > 1:
        raise ValueError(
            f"--num_heads {count}: heads of different sizes at {widths} channels are not supported; expected 1, or "
            "--num_head_channels"
        )
    return lambda width: count


def _image_size(structure: Structure, notes: list[str]) -> int:
    multiples = tuple(width / structure.widths[0] for width in structure.widths)
    if multiples not in IMAGE_SIZES:
        raise ValueError(f"--resolution is missing: cannot be inferred from the channels {structure.widths}")
    notes.append(f"resolution: {IMAGE_SIZES[multiples]}, inferred from the channels (override with --resolution)")
    return IMAGE_SIZES[multiples]


def _scheduler(options: dict[str, Any], hints: Hints, notes: list[str]) -> DDPMScheduler:
    """Return the scheduler; a linear schedule is scaled so that any number of steps ends at the same noise level."""
    steps, schedule = hints.num_train_timesteps or SCALE, hints.beta_schedule or "linear"
    require(hints, "beta_schedule", schedule in ("linear", "squaredcos_cap_v2"), "linear or squaredcos_cap_v2")
    require(hints, "prediction_type", hints.prediction_type != "mean", "epsilon or sample")
    process: dict[str, Any] = {
        "num_train_timesteps": steps,
        "beta_schedule": schedule,
        "beta_start": 1e-4 * SCALE / steps,
        "beta_end": 0.02 * SCALE / steps,
    }
    if hints.rescale_timesteps is not False and steps != SCALE:
        allowed = f"a multiple of {SCALE}, or --rescale_timesteps false"
        require(hints, "num_train_timesteps", steps % SCALE == 0, allowed)
        betas = beta_schedule(schedule, steps, process["beta_start"], process["beta_end"])
        kept = GaussianDiffusion(betas).respaced(range(0, steps, steps // SCALE))
        process = {"num_train_timesteps": SCALE, "trained_betas": kept.betas.tolist()}
        notes.append(f"process: every {steps // SCALE}th of {steps} steps, numbered 0 to {SCALE - 1} for the network")
    variance = hints.variance(options["in_channels"], options["out_channels"], "learned_range", "fixed_large")
    return DDPMScheduler(**process, variance_type=variance, prediction_type=hints.prediction_type or "epsilon")


def _reader(ours: str, heads: Callable[[int], int], is_new: bool) -> Callable[[Tensor], Tensor]:
    """Return the `read` function of a parameter of our network."""
    for part, layer in enumerate(("to_q", "to_k", "to_v")):
        if f".{layer}." in ours:
            return partial(_part, part, heads, is_new)
    return unchanged


def _part(part: int, heads: Callable[[int], int], is_new: bool, stored: Tensor) -> Tensor:
    """Return the queries, keys or values of all heads, stored head by head, or one after another in the new order."""
    if is_new:
        return stored.unflatten(0, (3, -1))[part]
    return stored.unflatten(0, (heads(len(stored) // 3), 3, -1))[:, part].flatten(0, 1)
