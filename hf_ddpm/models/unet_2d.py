"""The U-Net of the paper: a drop-in replacement for the diffusers U-Net."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from hf_ddpm.models.blocks import GroupNorm, TimestepEmbedding, activate, sinusoidal
from hf_ddpm.models.dropout import seed_dropout
from hf_ddpm.models.stages import DownStage, MidStage, UpStage
from hf_ddpm.utils.schema import CheckedConfig, check_range

DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D")
# Options that are counts.
COUNTS = (
    *("sample_size", "in_channels", "out_channels", "time_embedding_dim", "block_out_channels", "attention_head_dim"),
    *("norm_num_groups", "attn_norm_num_groups", "num_class_embeds", "num_train_timesteps"),
)


class _EqualToStock(type):
    """Makes `UNet2DModel == diffusers.UNet2DModel`: `from_pipe` of diffusers requires equal component types."""

    def __eq__(cls, other: object) -> bool:
        return cls is other or (cls is UNet2DModel and other is diffusers.UNet2DModel)

    __hash__ = type.__hash__


class UNet2DModel(CheckedConfig, ModelMixin, ConfigMixin, metaclass=_EqualToStock):
    r"""U-Net that predicts, from $x_t$ and `t`, the noise or another target of the same shape.

    The network of Ho et al. 2020, Appendix B: a U-Net of residual blocks with group normalization, a sinusoidal time
    embedding added in each block, and self-attention at chosen resolutions. Configuration and state dict are those of
    `diffusers.UNet2DModel`: each class loads models saved by the other.

    Args:
        sample_size: Height and width of the images; one number if they are equal.
        in_channels: Channels of the images.
        out_channels: Channels of the output: the channels of the images, or twice as many with a learned variance.
        center_input_sample: Convert images from [0, 1] to [-1, 1] in `forward`.
        time_embedding_type: Only `positional`, the sinusoidal embedding.
        time_embedding_dim: Size of the timestep embedding; by default four times the first of `block_out_channels`.
        freq_shift: See `hf_ddpm.models.blocks.sinusoidal`; 1 in the paper's code.
        flip_sin_to_cos: See `hf_ddpm.models.blocks.sinusoidal`; False in the paper's code.
        down_block_types: `DownBlock2D`, or `AttnDownBlock2D` with attention, per resolution from highest to lowest.
        mid_block_type: `UNetMidBlock2D`, or None for no middle block.
        up_block_types: `UpBlock2D`, or `AttnUpBlock2D` with attention, per resolution from lowest to highest.
        block_out_channels: Channels per resolution, from highest to lowest.
        layers_per_block: Residual blocks per resolution in the down path; the up path has one more.
        mid_block_scale_factor: Divisor of the outputs of residual blocks and attention in the middle block.
        downsample_padding: Padding of downsampling convolutions: 1, or 0 for asymmetric padding as in the paper's code.
        downsample_type: Downsampling of blocks with attention: `conv` or `resnet`. Other blocks use `conv`.
        upsample_type: Upsampling of blocks with attention: `conv` or `resnet`. Other blocks use `conv`.
        dropout: Dropout probability in [0, 1).
        act_fn: Activation function: only `silu`, also called `swish`.
        attention_head_dim: Channels per attention head; None for a single head, as in the paper.
        norm_num_groups: Number of groups of the normalizations.
        attn_norm_num_groups: Number of groups of the normalization of the middle block's attention.
        norm_eps: Epsilon of the normalizations.
        resnet_time_scale_shift: Use of the timestep embedding: `default` (added) or `scale_shift`.
        add_attention: Use attention in the middle block.
        class_embed_type: Only None.
        num_class_embeds: Number of class embeddings; None for an unconditional network.
        num_train_timesteps: Not used with `positional` embeddings; kept because checkpoints contain it.

    Raises:
        ValueError: If an option has an unsupported value or is out of range.

    Examples:
        >>> unet = UNet2DModel(sample_size=8, block_out_channels=(16, 32), norm_num_groups=8,
        ...                    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        ...                    up_block_types=("AttnUpBlock2D", "UpBlock2D"))
        >>> unet(torch.randn(4, 3, 8, 8), torch.tensor([0, 10, 100, 999])).sample.shape
        torch.Size([4, 3, 8, 8])
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["norm"]

    # Names of weights in the loaded file that do not belong to this architecture.
    unexpected_keys: tuple[str, ...] = ()

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels: tuple[int, ...] = (224, 448, 672, 896),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | None = 8,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
    ):
        super().__init__()
        self.check_values(self.config)
        channels = block_out_channels
        time_dim = time_embedding_dim or channels[0] * 4
        resnet = {
            "time_dim": time_dim,
            "groups": norm_num_groups,
            "eps": norm_eps,
            "dropout": dropout,
            "scale_shift": resnet_time_scale_shift == "scale_shift",
        }

        def head_dim(attends: bool, width: int) -> int | None:
            return (attention_head_dim or width) if attends else None

        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], time_dim)
        self.class_embedding = None if num_class_embeds is None else nn.Embedding(num_class_embeds, time_dim)

        self.down_blocks = nn.ModuleList()
        self.up_blocks = nn.ModuleList()  # registered before the middle block, filled after it: see blocks.py
        skip_channels = [channels[0]]
        last = len(channels) - 1
        for i, (block_type, width) in enumerate(zip(down_block_types, channels, strict=True)):
            attends = block_type.startswith("Attn")
            resample = downsample_type if attends else "conv"
            stage = DownStage(
                channels[max(i - 1, 0)],
                width,
                layers=layers_per_block,
                head_dim=head_dim(attends, width),
                downsample=resample if i < last else None,
                padding=downsample_padding,
                **resnet,
            )
            self.down_blocks.append(stage)
            skip_channels += [width] * (layers_per_block + (i < last))

        self.mid_block = None
        if mid_block_type is not None:
            attn_groups = norm_num_groups if resnet_time_scale_shift == "default" else None
            self.mid_block = MidStage(
                channels[-1],
                head_dim=head_dim(add_attention, channels[-1]),
                attn_groups=attn_norm_num_groups or attn_groups,
                scale=mid_block_scale_factor,
                **resnet,
            )

        for i, (block_type, width) in enumerate(zip(up_block_types, reversed(channels), strict=True)):
            attends = block_type.startswith("Attn")
            resample = upsample_type if attends else "conv"
            stage = UpStage(
                channels[min(last - i + 1, last)],
                width,
                skip_channels=[skip_channels.pop() for _ in range(layers_per_block + 1)],
                head_dim=head_dim(attends, width),
                upsample=resample if i < last else None,
                **resnet,
            )
            self.up_blocks.append(stage)

        self.conv_norm_out = GroupNorm(norm_num_groups, channels[0], eps=norm_eps)
        self.conv_out = nn.Conv2d(channels[0], out_channels, 3, padding=1)
        self._has_run = False  # on a GPU

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        r"""Predict the training target of $x_t$.

        Args:
            sample: $x_t$, shape `(B, C, H, W)`; `H` and `W` must be multiples of `size_multiple`.
            timestep: Timestep `t` in [0, T): one number, or shape `(B,)`.
            class_labels: Class labels in [0, `num_class_embeds`), int64, shape `(B,)`; None for an unconditional
                network.
            return_dict: Return a `UNet2DOutput` instead of a tuple.

        Returns:
            The prediction, shape `(B, out_channels, H, W)`, as `.sample` or in a tuple.

        Raises:
            ValueError: If `H` or `W` is not a multiple of `size_multiple`, if a conditional network gets no class
                labels, or if an unconditional network gets some.
        """
        self._check_input(sample, class_labels)
        if sample.is_cuda and not self._has_run and not torch.compiler.is_compiling():
            self._prepare_for_gpu()
        if self.config.center_input_sample:
            sample = 2 * sample - 1

        emb = self.time_embedding(self._sinusoids(timestep, sample))
        if self.class_embedding is not None:
            emb = emb + self.class_embedding(class_labels)
        emb = F.silu(emb)  # once here instead of in every residual block

        # After conv_in, since one-channel tensors have no channels-last layout.
        x = self.conv_in(sample).contiguous(memory_format=torch.channels_last)
        skips = [x]
        for down in self.down_blocks:
            skips += down(x, emb)
            x = skips[-1]
        if self.mid_block is not None:
            x = self.mid_block(x, emb)
        for up in self.up_blocks:
            count = len(up.resnets)
            skips, stage_skips = skips[:-count], skips[-count:]
            x = up(x, tuple(stage_skips), emb)
        x = self.conv_out(activate(self.conv_norm_out(x))).contiguous()

        return UNet2DOutput(sample=x) if return_dict else (x,)

    @property
    def size_multiple(self) -> int:
        """The number that height and width must be multiples of: each resolution after the first halves them."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def seed_dropout(self, keys: Tensor | None) -> None:
        """Make dropout masks reproducible: a function of one key per image, the layer and the position.

        Args:
            keys: One key per image of the next forward passes, int32, shape `(B,)`; None restores torch's masks.
        """
        seed_dropout(self, keys)

    @torch.inference_mode(False)
    def lay_out_kernels(self) -> None:
        """Convert the kernels of convolutions to channels-last, the memory layout of the feature maps.

        Convolutions on GPUs are fast only in matching layouts. With a single process, the first forward pass on a GPU
        calls this method. With several processes, call it before wrapping the network in DDP. The constructor does not
        call it because FSDP2 shards only contiguous weights. To undo it, call
        `unet.to(memory_format=torch.contiguous_format)`.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and type(module.weight) is nn.Parameter:
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "UNet2DModel":
        """Load a network as diffusers does; load a pickle only if the folder contains no safetensors file.

        Args:
            pretrained_model_name_or_path: Folder or Hub id of the network.
            **kwargs: Arguments of `diffusers.ModelMixin.from_pretrained`.

        Returns:
            The network, or a tuple of the network and a dictionary with `output_loading_info=True`.
        """
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        if kwargs.get("use_safetensors") is None and folder.is_dir():
            kwargs["use_safetensors"] = any(folder.glob("*.safetensors*")) or not any(folder.glob("*.bin*"))
        with_info = kwargs.pop("output_loading_info", False)
        network, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        network.unexpected_keys = tuple(info["unexpected_keys"])
        return (network, info) if with_info else network

    def to_json_string(self) -> str:
        """Return the configuration as JSON, without the local path of the weights."""
        config = json.loads(super().to_json_string())
        config.pop("_name_or_path", None)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def _prepare_for_gpu(self) -> None:
        """Call `lay_out_kernels`, unless a distributed wrapper such as DDP may hold views of the kernels."""
        self._has_run = True
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            self.lay_out_kernels()

    def _sinusoids(self, timestep: Tensor | float | int, sample: Tensor) -> Tensor:
        if not isinstance(timestep, Tensor) or (timestep.ndim == 0 and timestep.device.type == "cpu"):
            # torch.full on the device avoids a copy and a synchronization; one row is broadcast over the batch.
            t = torch.full((1,), float(timestep), device=sample.device)
        else:
            t = timestep.to(sample.device).view(-1)
        sinusoids = sinusoidal(
            t,
            self.config.block_out_channels[0],
            flip_sin_to_cos=self.config.flip_sin_to_cos,
            freq_shift=self.config.freq_shift,
        )
        return sinusoids.to(sample.dtype)

    def _check_input(self, sample: Tensor, class_labels: Tensor | None) -> None:
        height, width = sample.shape[-2:]
        if height % self.size_multiple or width % self.size_multiple:
            raise ValueError(
                f"images of {height}x{width}: expected height and width to be multiples of {self.size_multiple}, since "
                f"the U-Net halves them {len(self.config.block_out_channels) - 1} times"
            )
        if (class_labels is None) != (self.class_embedding is None):
            if class_labels is None:
                raise ValueError("class_labels are missing: the U-Net is class-conditional")
            raise ValueError("class_labels: expected None, since the U-Net is unconditional (num_class_embeds=None)")

    @classmethod
    def check_values(cls, config: Mapping[str, Any]) -> None:
        """Check the options of a network.

        Args:
            config: Values of all options of the constructor.

        Raises:
            ValueError: If an option has an unsupported value or is out of range; the message names option and value.
        """
        allowed = {
            "time_embedding_type": ("positional",),
            "mid_block_type": ("UNetMidBlock2D", None),
            "downsample_padding": (0, 1),
            "downsample_type": ("conv", "resnet"),
            "upsample_type": ("conv", "resnet"),
            "act_fn": ("silu", "swish"),
            "resnet_time_scale_shift": ("default", "scale_shift"),
            "class_embed_type": (None,),
        }
        given = [(name, config[name], options) for name, options in allowed.items()]
        given += [("down_block_types", block, DOWN_BLOCKS) for block in config["down_block_types"]]
        given += [("up_block_types", block, UP_BLOCKS) for block in config["up_block_types"]]
        for name, value, options in given:
            if value not in options:
                raise ValueError(
                    f"{name}={value!r}: not supported by hf_ddpm.UNet2DModel; expected "
                    f"{' or '.join(map(repr, options))}. For other architectures pass "
                    "unet=diffusers.UNet2DModel.from_pretrained(...) to the pipeline"
                )
        check_range(config, 1, 2**20, *COUNTS)
        check_range(config, 1, 2**10, "layers_per_block")
        check_range(config, 0, 1, "dropout")
        check_range(config, 1e-30, 1e30, "norm_eps", "mid_block_scale_factor")
        widths, groups = config["block_out_channels"], config["norm_num_groups"]
        if not widths:
            raise ValueError(f"block_out_channels={widths}: expected at least one number")
        check_range(config, 0, widths[0] // 2 - 1, "freq_shift")
        if not len(config["down_block_types"]) == len(config["up_block_types"]) == len(widths):
            raise ValueError(
                f"down_block_types={config['down_block_types']}, up_block_types={config['up_block_types']}, "
                f"block_out_channels={widths}: expected the same number of entries, one per resolution"
            )
        if any(width % groups for width in widths):
            raise ValueError(f"block_out_channels={widths}: expected multiples of norm_num_groups={groups}")
        if widths[-1] % (config["attn_norm_num_groups"] or 1):
            raise ValueError(
                f"attn_norm_num_groups={config['attn_norm_num_groups']}: expected a divisor of {widths[-1]}"
            )
