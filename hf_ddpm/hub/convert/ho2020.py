"""Conversion of checkpoints of Ho et al. 2020 (hojonathanho/diffusion) and of its PyTorch port by pesser.

TensorFlow checkpoints are read from an `.npz` file. To create it, run with TensorFlow installed:

    reader = tf.train.load_checkpoint("model.ckpt-790000")
    np.savez("model.npz", **{name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()})

In this file, convolution weights have the shape `(H, W, in, out)`, weights of other layers `(in, out)`. It contains the
raw weights and, as `.../ExponentialMovingAverage`, the averaged weights. A file of the port contains only one of them.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from itertools import count, takewhile
from typing import Any

from torch import Tensor

from hf_ddpm.config import block_types
from hf_ddpm.hub.convert.conversion import (
    Conversion,
    Entry,
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

AVERAGED = "/ExponentialMovingAverage"
ATTENDED = 16  # resolution with attention in all scripts of the repository

OUTSIDE = {
    "conv_in": "conv_in",
    "time_embedding.linear_1": "temb.dense.0",
    "time_embedding.linear_2": "temb.dense.1",
    "conv_norm_out": "norm_out",
    "conv_out": "conv_out",
}
BLOCKS = {"resnets": "block.{}", "attentions": "attn.{}", "downsamplers": "downsample", "upsamplers": "upsample"}
LAYERS = {
    "norm1": "norm1", "conv1": "conv1", "time_emb_proj": "temb_proj", "norm2": "norm2", "conv2": "conv2",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
    "conv": "conv",
}  # fmt: skip


def plan(weights: Mapping[str, Any], hints: Hints) -> Conversion:
    """Plan the conversion of a checkpoint.

    The number of resolutions and blocks, the channels and the attention are inferred from names and shapes. The image
    size is inferred by assuming attention at 16x16, as in all networks of the paper. The variance is assumed to be
    `fixed_large` below 256x256 and `fixed_small` from 256x256, as in the scripts for CIFAR-10, LSUN and CelebA-HQ.

    Args:
        weights: Arrays or tensors by name.
        hints: Settings that the file does not contain.

    Returns:
        The plan; the weights may still lack tensors.

    Raises:
        ValueError: If the checkpoint has another layout or unsupported layers, or a hint does not fit.
    """
    hints.check("ho2020")
    tensors = as_tensors(weights)
    name, ignored, notes = _layout(tensors, hints)
    is_tensorflow = name("conv_in.weight").endswith(("/W", AVERAGED))
    read = _outputs_first if is_tensorflow else unchanged

    def shape(part: str) -> tuple[int, ...]:
        """Return outputs, inputs, height and width of a convolution."""
        *sizes, ins, outs = stored = layer_shape(tensors, name(part))
        return (outs, ins, *sizes) if is_tensorflow else stored

    options = _architecture(lambda part: name(part) in tensors, shape, hints, notes)
    unet = empty_unet(**options)
    hints.check_resolution(unet.size_multiple)
    levels = len(options["block_out_channels"])
    entries = [Entry(ours, name(_their_name(ours, levels)), read) for ours in unet.state_dict()]
    return Conversion(DDPMPipeline(unet, _scheduler(options, hints, notes)), tensors, entries, ignored, notes)


def _layout(tensors: Mapping[str, Tensor], hints: Hints) -> tuple[Callable[[str], str], list[str], list[str]]:
    """Return a function that maps names of the port to names in the file, the ignored names, and notes."""
    scopes = [match[1] for match in map(re.compile(rf"(.*/)?conv_in/W({AVERAGED})?").fullmatch, tensors) if match]
    if not scopes:
        require(
            hints, "weights", hints.weights is None, "a PyTorch file has only one kind of weights; expected no value"
        )
        return unchanged, [], ["weights: as stored; the file does not record whether they are averaged"]
    scope = scopes[0] or ""
    is_averaged = any(name.endswith(AVERAGED) for name in tensors)
    require(
        hints, "weights", hints.weights != "ema" or is_averaged, "the file contains no averaged weights; expected raw"
    )
    suffix = AVERAGED if is_averaged and hints.weights != "raw" else ""

    def is_ignored(name: str) -> bool:
        other = name + AVERAGED in tensors if suffix else name.endswith(AVERAGED)
        return other or re.fullmatch(r".*/(Adam|RMSProp)(_1)?|global_step|beta[12]_power", name) is not None

    ignored = sorted(filter(is_ignored, tensors))
    return partial(_tensorflow_name, scope, suffix), ignored, [f"weights: {'averaged' if suffix else 'raw'}"]


def _tensorflow_name(scope: str, suffix: str, part: str) -> str:
    module, leaf = part.rsplit(".", 1)
    is_norm = module.rsplit(".", 1)[-1].startswith("norm")
    leaf = {"weight": "gamma" if is_norm else "W", "bias": "beta" if is_norm else "b"}[leaf]
    path = re.sub(r"\b(down|up|block|attn)\.(\d+)", r"\1_\2", module)
    path = re.sub(r"\bdense\.(\d+)", r"dense\1", path).replace(".", "/")
    return f"{scope}{path}/{leaf}{suffix}"


def _their_name(ours: str, levels: int) -> str:
    """Return the port's name for a parameter of our network."""
    path, leaf = ours.rsplit(".", 1)
    place = place_of(path)
    if place is None:
        return f"{OUTSIDE[path]}.{leaf}"
    if place.stage == "mid":
        block = f"mid.{'block' if place.kind == 'resnets' else 'attn'}_{place.number + 1}"
    else:
        level = place.index if place.stage == "down" else levels - 1 - place.index  # same indices in both paths
        block = f"{place.stage}.{level}.{BLOCKS[place.kind].format(place.number)}"
    return f"{block}.{LAYERS[place.layer]}.{leaf}"


def _architecture(
    has: Callable[[str], bool], shape: Callable[[str], tuple[int, ...]], hints: Hints, notes: list[str]
) -> dict[str, Any]:
    """Return the options of the network, inferred from names and shapes."""
    channels, outputs = shape("conv_in.weight")[1], shape("conv_out.weight")[0]
    levels = len(list(takewhile(lambda i: has(f"down.{i}.block.0.conv1.weight"), count())))
    blocks = len(list(takewhile(lambda j: has(f"down.0.block.{j}.conv1.weight"), count())))
    if not levels:
        shape("down.0.block.0.conv1.weight")  # raises, since it is missing
    attends = [has(f"down.{i}.attn.0.q.weight") for i in range(levels)]
    for level in range(levels - 1):
        if not has(f"down.{level}.downsample.conv.weight"):
            raise ValueError("resampling without a convolution (resamp_with_conv=False) is not supported")
    if has("down.1.block.0.conv_shortcut.weight"):
        raise ValueError("3x3 convolutions in the skip connections (conv_shortcut=True) are not supported")
    widths = tuple(shape(f"down.{i}.block.0.conv1.weight")[0] for i in range(levels))
    if shape("conv_in.weight")[0] != widths[0]:
        raise ValueError("different channels in conv_in and the first resolution (ch_mult[0] != 1) are not supported")
    return {
        "sample_size": hints.resolution or _image_size(attends, notes),
        "in_channels": channels,
        "out_channels": outputs,
        "block_out_channels": widths,
        **block_types(attends),
        "layers_per_block": blocks,
        "attention_head_dim": None,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_num_groups": 32,
        "norm_eps": 1e-6,
    }


def _image_size(attends: list[bool], notes: list[str]) -> int:
    if sum(attends) != 1:
        raise ValueError(
            f"--resolution is missing: cannot be inferred from a network with attention at {sum(attends)} resolutions"
        )
    size = ATTENDED * 2 ** attends.index(True)
    notes.append(f"resolution: {size}, assuming attention at {ATTENDED}x{ATTENDED} (override with --resolution)")
    return size


def _scheduler(options: dict[str, Any], hints: Hints, notes: list[str]) -> DDPMScheduler:
    schedule = hints.beta_schedule or "linear"
    require(hints, "beta_schedule", schedule != "squaredcos_cap_v2", "linear, quad or const")
    require(hints, "variance_type", hints.variance_type != "learned_range", "fixed_small, fixed_large or learned")
    fixed = "fixed_small" if options["sample_size"] >= 256 else "fixed_large"
    variance = hints.variance(options["in_channels"], options["out_channels"], "learned", fixed)
    if hints.variance_type is None:
        notes.append(f"variance: {variance}, as in the original scripts (override with --variance_type)")
    return DDPMScheduler(
        num_train_timesteps=hints.num_train_timesteps or 1000,
        beta_schedule=schedule,
        variance_type=variance,
        prediction_type=hints.prediction_type or "epsilon",
    )


def _outputs_first(stored: Tensor) -> Tensor:
    """Return the weights of a TensorFlow layer with outputs and inputs as the first dimensions."""
    return stored.permute(3, 2, 0, 1) if stored.ndim == 4 else stored.mT if stored.ndim == 2 else stored
