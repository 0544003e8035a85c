"""Reference implementation of the network of openai/improved-diffusion and guided-diffusion, with its parameter names.

It computes in float64, except for the timestep embedding: the original networks were trained with float32 sinusoids,
which differ from float64 sinusoids at late steps.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Residual(nn.Module):
    def __init__(self, before, after, emb, scale_shift, resample=None):
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(32, before), nn.SiLU(), nn.Conv2d(before, after, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * after if scale_shift else after))
        conv = nn.Conv2d(after, after, 3, padding=1)
        self.out_layers = nn.Sequential(nn.GroupNorm(32, after), nn.SiLU(), nn.Dropout(0.0), conv)
        self.skip_connection = nn.Identity() if before == after else nn.Conv2d(before, after, 1)
        self.scale_shift, self.resample = scale_shift, resample or nn.Identity()

    def forward(self, x, emb):
        h = self.in_layers[2](self.resample(self.in_layers[:2](x)))
        time = self.emb_layers(emb)[..., None, None]
        if self.scale_shift:
            width = h.shape[1]
            h = self.out_layers[0](h) * (1 + time[:, :width]) + time[:, width:]
            h = self.out_layers[1:](h)
        else:
            h = self.out_layers(h + time)
        return self.skip_connection(self.resample(x)) + h


class Attention(nn.Module):
    def __init__(self, width, heads, new_order):
        super().__init__()
        self.norm = nn.GroupNorm(32, width)
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.proj_out = nn.Conv1d(width, width, 1)
        self.heads, self.new_order = heads, new_order

    def forward(self, x, emb):
        width = x.shape[1]
        size = width // self.heads
        rows, outputs = self.qkv(self.norm(x).flatten(2)), []
        for head in range(self.heads):
            # Old order: queries, keys and values of the first head, then those of the next head.
            starts = [head * size + part * width if self.new_order else (3 * head + part) * size for part in range(3)]
            q, k, v = (rows[:, start : start + size].transpose(1, 2) for start in starts)
            outputs.append(torch.softmax(q @ k.transpose(1, 2) / size**0.5, dim=-1) @ v)
        return x + self.proj_out(torch.cat(outputs, dim=2).transpose(1, 2)).reshape(x.shape)


class Down(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x, emb):
        return self.op(x)


class Up(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x, emb):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Plain(nn.Conv2d):
    def forward(self, x, emb):
        return super().forward(x)


class ImprovedNetwork(nn.Module):
    def __init__(
        self,
        *,
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attends=(1,),
        in_channels=3,
        learn_sigma=False,
        num_classes=None,
        heads=lambda width: 1,
        scale_shift=True,
        resblock_updown=False,
        new_order=False,
    ):
        super().__init__()
        torch.manual_seed(0)
        emb, self.model_channels = 4 * model_channels, model_channels
        self.time_embed = nn.Sequential(nn.Linear(model_channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, emb)

        def attention(level, width):
            return [Attention(width, heads(width), new_order)] if level in attends else []

        width = model_channels
        self.input_blocks = nn.ModuleList([nn.ModuleList([Plain(in_channels, width, 3, padding=1)])])
        skips, last = [width], len(channel_mult) - 1
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                layers = [Residual(width, mult * model_channels, emb, scale_shift)]
                width = mult * model_channels
                self.input_blocks.append(nn.ModuleList(layers + attention(level, width)))
                skips.append(width)
            if level != last:
                halve = Residual(width, width, emb, scale_shift, nn.AvgPool2d(2)) if resblock_updown else Down(width)
                self.input_blocks.append(nn.ModuleList([halve]))
                skips.append(width)
        middle = [Residual(width, width, emb, scale_shift), Attention(width, heads(width), new_order)]
        self.middle_block = nn.ModuleList([*middle, Residual(width, width, emb, scale_shift)])
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(last + 1)):
            for i in range(num_res_blocks + 1):
                layers = [Residual(width + skips.pop(), channel_mult[level] * model_channels, emb, scale_shift)]
                width = channel_mult[level] * model_channels
                layers += attention(level, width)
                if level and i == num_res_blocks:
                    twice = nn.Upsample(scale_factor=2, mode="nearest")
                    layers.append(Residual(width, width, emb, scale_shift, twice) if resblock_updown else Up(width))
                self.output_blocks.append(nn.ModuleList(layers))
        out_channels = in_channels * (2 if learn_sigma else 1)
        self.out = nn.Sequential(
            nn.GroupNorm(32, width), nn.SiLU(), nn.Conv2d(model_channels, out_channels, 3, padding=1)
        )
        with torch.no_grad():  # biases and gains large enough to affect the outputs
            for value in self.parameters():
                value.add_(0.1 * torch.randn(value.shape)) if value.ndim == 1 else value.mul_(2)
        self.double()

    @torch.no_grad()
    def forward(self, x, t, y=None):
        half = self.model_channels // 2
        angles = t.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / half)
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1).double())
        if y is not None:
            emb = emb + self.label_emb(y)
        hs, h = [], x.double()
        for block in self.input_blocks:
            for layer in block:
                h = layer(h, emb)
            hs.append(h)
        for layer in self.middle_block:
            h = layer(h, emb)
        for block in self.output_blocks:
            h = torch.cat([h, hs.pop()], dim=1)
            for layer in block:
                h = layer(h, emb)
        return self.out(h)
