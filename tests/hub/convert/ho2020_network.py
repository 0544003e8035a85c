"""Reference implementation of the network of Ho et al. 2020 in float64 numpy, channels last.

Variables are created at their first use, with TensorFlow's names.
"""

import re

import numpy as np


class HoNetwork:
    def __init__(self, *, ch=32, ch_mult=(1, 2), num_res_blocks=1, attends=(1,), channels=3, out_ch=3, seed=0):
        self.ch, self.ch_mult, self.num_res_blocks, self.attends = ch, ch_mult, num_res_blocks, attends
        self.channels, self.out_ch = channels, out_ch
        self.random = np.random.default_rng(seed)
        self.variables, self.kinds = {}, {}
        self(np.zeros((1, 8, 8, channels)), np.zeros(1))

    def get(self, name, kind, shape, mean=0.0, deviation=0.1):
        if name not in self.variables:
            self.variables[name] = (mean + deviation * self.random.normal(size=shape)).astype(np.float32)
            self.kinds[name] = kind
        return self.variables[name].astype(np.float64)

    def linear(self, name, x, units, kind):
        weights = self.get(f"{name}/W", kind, (x.shape[-1], units), deviation=x.shape[-1] ** -0.5)
        return x @ weights + self.get(f"{name}/b", "b", (units,))

    def conv(self, name, x, units, stride=1):
        """3x3 convolution with SAME padding: output size ceil(n / stride), an odd padding pixel at the end."""
        size, fan_in = x.shape[1:3], 9 * x.shape[-1]
        kernel = self.get(f"{name}/W", "conv", (3, 3, x.shape[-1], units), deviation=fan_in**-0.5)
        out = [-(-n // stride) for n in size]
        padding = [max((m - 1) * stride + 3 - n, 0) for n, m in zip(size, out, strict=True)]
        x = np.pad(x, [(0, 0), *((p // 2, p - p // 2) for p in padding), (0, 0)])
        y = sum(
            x[:, i : i + stride * (out[0] - 1) + 1 : stride, j : j + stride * (out[1] - 1) + 1 : stride] @ kernel[i, j]
            for i in range(3)
            for j in range(3)
        )
        return y + self.get(f"{name}/b", "b", (units,))

    def normalize(self, name, x):
        groups = x.reshape(*x.shape[:3], 32, -1)
        mean, variance = groups.mean((1, 2, 4), keepdims=True), groups.var((1, 2, 4), keepdims=True)
        x = ((groups - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape)
        width = x.shape[-1:]
        return x * self.get(f"{name}/gamma", "gamma", width, mean=1.0) + self.get(f"{name}/beta", "beta", width)

    def resnet_block(self, name, x, temb, out_ch):
        h = self.conv(f"{name}/conv1", swish(self.normalize(f"{name}/norm1", x)), out_ch)
        h = h + self.linear(f"{name}/temb_proj", swish(temb), out_ch, "dense")[:, None, None]
        h = self.conv(f"{name}/conv2", swish(self.normalize(f"{name}/norm2", h)), out_ch)
        return h + (x if x.shape[-1] == out_ch else self.linear(f"{name}/nin_shortcut", x, out_ch, "nin"))

    def attn_block(self, name, x):
        b, h, w, c = x.shape
        normal = self.normalize(f"{name}/norm", x)
        q, k, v = (self.linear(f"{name}/{part}", normal, c, "nin").reshape(b, h * w, c) for part in "qkv")
        scores = q @ k.transpose(0, 2, 1) * c**-0.5
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (scores / scores.sum(-1, keepdims=True)) @ v
        return x + self.linear(f"{name}/proj_out", mixed.reshape(x.shape), c, "nin")

    def __call__(self, x, t):
        half = self.ch // 2
        angles = t[:, None] * np.exp(np.arange(half) * -(np.log(10000) / (half - 1)))
        temb = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
        temb = self.linear("model/temb/dense0", temb, 4 * self.ch, "dense")
        temb = self.linear("model/temb/dense1", swish(temb), 4 * self.ch, "dense")
        levels = len(self.ch_mult)
        hs = [self.conv("model/conv_in", x, self.ch)]
        for level, mult in enumerate(self.ch_mult):
            name = f"model/down_{level}"
            for block in range(self.num_res_blocks):
                h = self.resnet_block(f"{name}/block_{block}", hs[-1], temb, self.ch * mult)
                hs.append(self.attn_block(f"{name}/attn_{block}", h) if level in self.attends else h)
            if level != levels - 1:
                hs.append(self.conv(f"{name}/downsample/conv", hs[-1], hs[-1].shape[-1], stride=2))
        h = self.resnet_block("model/mid/block_1", hs[-1], temb, hs[-1].shape[-1])
        h = self.attn_block("model/mid/attn_1", h)
        h = self.resnet_block("model/mid/block_2", h, temb, h.shape[-1])
        for level in reversed(range(levels)):
            name = f"model/up_{level}"
            for block in range(self.num_res_blocks + 1):
                h = np.concatenate([h, hs.pop()], axis=-1)
                h = self.resnet_block(f"{name}/block_{block}", h, temb, self.ch * self.ch_mult[level])
                h = self.attn_block(f"{name}/attn_{block}", h) if level in self.attends else h
            if level != 0:
                h = self.conv(f"{name}/upsample/conv", h.repeat(2, axis=1).repeat(2, axis=2), h.shape[-1])
        assert not hs
        return self.conv("model/conv_out", swish(self.normalize("model/norm_out", h)), self.out_ch)

    def ported(self):
        """Return the weights with the names and layout of the PyTorch port (pesser)."""
        state = {}
        for name, value in self.variables.items():
            kind = self.kinds[name]
            if kind == "conv":
                value = value.transpose(3, 2, 0, 1)
            elif kind in ("dense", "nin"):
                value = value.T[:, :, None, None] if kind == "nin" else value.T
            *path, leaf = name.split("/")[1:]
            if path[0] == "temb":
                path[1:] = ["dense", path[1][-1]]
            elif path[0] != "mid" and len(path) > 1:
                path = [part for piece in path[:2] for part in piece.split("_")] + path[2:]
            leaf = "weight" if leaf in ("W", "gamma") else "bias"
            state[".".join([*path, leaf])] = np.ascontiguousarray(value)
        assert len(state) == len(self.variables) and all(re.fullmatch(r"[\w.]+", name) for name in state)
        return state


def swish(x):
    return x / (1 + np.exp(-x))
