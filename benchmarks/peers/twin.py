"""The digits network of `examples/digits.py` in torch, with the same weights.

Written as one writes it in torch: its own convolution, attention and layer norm, channels first.
"""

import math

import numpy as np
import torch
from flax.traverse_util import flatten_dict
from torch import nn
from torch.nn import functional as F  # noqa: N812, torch's own custom

import digits

PARTS = ("query", "key", "value")  # of attention


class Norm(nn.Module):
    """Over the channels of (batch, channels, h, w)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x):
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(128, 2 * width)
        self.norms = nn.ModuleList([Norm(width), Norm(width)])
        self.convs = nn.ModuleList(
            [nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)]
        )

    def forward(self, x, e):
        scale, shift = self.embed(e)[:, :, None, None].chunk(2, dim=1)
        h = self.convs[0](F.silu(self.norms[0](x)))
        return x + self.convs[1](F.silu(self.norms[1](h) * (1 + scale) + shift))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        parts = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))


class DigitsNet(nn.Module):
    """x (batch, 1, 8, 8), t (batch,), label (batch,) -> (batch, 1, 8, 8)."""

    def __init__(self, width: int = 80) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2.0 ** torch.linspace(-2, 4, 16))
        self.times = nn.ModuleList([nn.Linear(32, 128), nn.Linear(128, 128)])
        self.labels = nn.Embedding(digits.NULL + 1, 128)
        self.first, self.last = nn.Conv2d(4, width, 3, padding=1), nn.Conv2d(width, 4, 3, padding=1)
        self.blocks = nn.ModuleList([Block(width) for _ in range(3)])
        self.norms = nn.ModuleList([Norm(width), Norm(width)])
        self.attention = Attention(width)

    def forward(self, x, t, label):
        angle = t[:, None] * self.frequencies
        e = self.times[0](torch.cat([angle.sin(), angle.cos()], dim=-1))
        e = F.silu(self.times[1](F.silu(e)) + self.labels(label))
        h = self.blocks[0](self.first(F.pixel_unshuffle(x, 2)), e)
        pixels = self.norms[0](h).flatten(2).transpose(1, 2)
        h = h + self.attention(pixels).transpose(1, 2).reshape(h.shape)
        h = self.blocks[1](self.blocks[2](h, e), e)  # flax names the outer one first
        return F.pixel_shuffle(self.last(F.silu(self.norms[1](h))), 2)


def _names() -> dict[str, str]:
    """Module of torch -> of flax."""
    names = {"times.0": "Dense_0", "times.1": "Dense_1", "labels": "Embed_0"}
    names |= {"first": "Conv_0/Dense_0", "last": "Conv_1/Dense_0"}
    names |= {f"norms.{i}.norm": f"LayerNorm_{i}" for i in range(2)}
    for b in range(3):
        names[f"blocks.{b}.embed"] = f"Block_{b}/Dense_0"
        for i in range(2):
            names[f"blocks.{b}.norms.{i}.norm"] = f"Block_{b}/LayerNorm_{i}"
            names[f"blocks.{b}.convs.{i}"] = f"Block_{b}/Conv_{i}/Dense_0"
    return names


def network() -> DigitsNet:
    """With the trained weights."""
    params = flatten_dict(digits.network()[1]["params"], sep="/")
    weights = {name: np.asarray(value) for name, value in params.items()}
    module = DigitsNet()
    state = {"frequencies": module.frequencies.numpy()}
    for ours, theirs in _names().items():
        kind = {"Embed_0": "embedding"}.get(theirs, "scale" if "LayerNorm" in theirs else "kernel")
        weight = weights[f"{theirs}/{kind}"]
        if "Conv" in theirs:  # rows are (3, 3, channels)
            weight = weight.reshape(3, 3, -1, weight.shape[1]).transpose(3, 2, 0, 1)
        elif kind == "kernel":
            weight = weight.T
        state[f"{ours}.weight"] = weight
        if kind != "embedding":
            state[f"{ours}.bias"] = weights[f"{theirs}/bias"]
    width = len(weights["SelfAttention_0/out/bias"])
    heads = [weights[f"SelfAttention_0/{p}/kernel"].reshape(-1, width) for p in PARTS]
    state["attention.qkv.weight"] = np.concatenate([h.T for h in heads])
    state["attention.qkv.bias"] = np.concatenate(
        [weights[f"SelfAttention_0/{p}/bias"].ravel() for p in PARTS]
    )
    state["attention.out.weight"] = weights["SelfAttention_0/out/kernel"].reshape(-1, width).T
    state["attention.out.bias"] = weights["SelfAttention_0/out/bias"]
    tensors = {k: torch.as_tensor(np.array(v, order="C")) for k, v in state.items()}
    module.load_state_dict(tensors)
    return module.eval().requires_grad_(False)


class Denoiser(nn.Module):
    """(x, sigma) -> x0 of Karras et al. 2022, table 1; x (batch, 8, 8, 1) as on the other side."""

    def __init__(self, label) -> None:
        super().__init__()
        self.network = network()
        self.register_buffer("label", torch.as_tensor(np.array(label, np.int64)))

    def forward(self, x, sigma):
        norm = math.hypot(sigma, digits.SIGMA_DATA)
        t = torch.full((len(x),), math.log(sigma) / 4, dtype=x.dtype, device=x.device)
        raw = self.network(x.reshape(-1, 1, 8, 8) / norm, t, self.label).reshape(x.shape)
        return (digits.SIGMA_DATA / norm) ** 2 * x + sigma * digits.SIGMA_DATA / norm * raw
