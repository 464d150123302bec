"""Networks of EDM, score_sde, guided-diffusion and consistency models, from their own files.

    checkpoint = load_edm("edm-cifar10-32x32-uncond-vp.pkl")
    denoiser = sd.from_linen(**checkpoint._asdict())
    solution = sd.sample(key, denoiser, (16, 32, 32, 3), sigmas=sd.karras_sigmas(10))

Most of the files are pickles, which are read as data: nothing in them is imported or run, and torch
is not needed. It needs the extra `checkpoints`. NVIDIA's weights are licensed CC BY-NC-SA.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax import Array

from steindiff_jax import _checks, schedules
from steindiff_jax._pytree import pytree
from steindiff_jax.interop import _json, _pickle, _weights
from steindiff_jax.interop.networks import SongUNet, UNet2D
from steindiff_jax.protocols import Numeric, Schedule

Arrays = dict[str, np.ndarray]


class Snapshot(NamedTuple):
    """A trained network, named as the arguments of `from_linen`."""

    module: UNet2D | SongUNet
    variables: dict[str, Any]
    schedule: Schedule
    prediction: str
    sigma_data: Numeric = 0.5
    time_scale: Numeric = 1.0


@pytree
class LogSigma(schedules.EDM):
    """`EDM` for a network that is told log(sigma / 2), as score_sde's is for pixels in [-1, 1]."""

    def sigma(self, t: Array) -> Array:
        return 2 * jnp.exp(t)

    def time(self, ratio: Array) -> Array:
        return jnp.log(ratio / 2)

    def at(self, ratio: Array) -> tuple[Array, Array, Array]:
        return self.time(ratio), jnp.ones_like(ratio), ratio


@pytree
class SubVP(schedules.VPLinear):
    """alpha of `VPLinear`, sigma = 1 - alpha^2 (Song et al. 2021, arXiv:2011.13456, eq. 29)."""

    @property
    def sigma_max(self) -> Array:
        """The ratio at t = 1."""
        return self.sigma(jnp.ones(())) / self.alpha(jnp.ones(()))

    def sigma(self, t: Array) -> Array:
        return -jnp.expm1(-self._integral(t))

    def time(self, ratio: Array) -> Array:
        return self.at(ratio)[0]

    def at(self, ratio: Array) -> tuple[Array, Array, Array]:
        alpha = 2 / (ratio + jnp.hypot(ratio, 2.0))  # of 1 - alpha^2 = ratio alpha
        return super().time(jnp.sqrt(ratio / alpha)), alpha, ratio * alpha


@pytree
class Steps(schedules.Discrete):
    """`Discrete` for a network that is told the nearest step, as EDM's iDDPM is."""

    def time(self, ratio: Array) -> Array:
        return jnp.rint(super().time(ratio))


def load_edm(
    path: str | Path,
    *,
    noise_schedule: str = "linear",
    num_head_channels: int = 64,
    num_heads: int | None = None,
    use_new_attention_order: bool = False,
    sde: str = "vpsde",
    image_size: int = 32,
    attn_resolutions: tuple[int, ...] = (16,),
) -> Snapshot:
    """The network of a snapshot of EDM (.pkl), of weights by OpenAI (.pt), of a Flax checkpoint.

    A snapshot (Karras et al. 2022, arXiv:2206.00364) says all: its network is DDPM++, NCSN++ or
    ADM, its preconditioning EDM's, VP's, VE's or iDDPM's, and what counts is its moving average,
    `ema`. A .pt has weights alone. The structure follows from these; the rest are flags as in
    guided-diffusion's README (Dhariwal & Nichol 2021, arXiv:2105.05233). Weights of consistency
    models (Song et al. 2023, arXiv:2303.01469) are known by their attention and use no flags:
    those of edm_*.pt denoise; those of cd_*.pt and ct_*.pt map x to data, for one step of `DDIM`.
    A `checkpoint_N` of score_sde in Flax (Song et al. 2021, arXiv:2011.13456) has weights alone
    too, of which `params_ema` count: DDPM++ or NCSN++ trained in continuous time, VE if it is told
    Fourier features. One of consistency_models_cifar10 has EDM's preconditioning.

    Args:
      path: the file.
      noise_schedule: of guided-diffusion, "linear" or "cosine"; this for ImageNet at 64 pixels.
      num_head_channels: features of an attention head, for a .pt.
      num_heads: of guided-diffusion: heads of every attention, in place of num_head_channels.
      use_new_attention_order: of guided-diffusion: True for ImageNet at 64 pixels.
      sde: of score_sde, "vpsde" or "subvpsde", for networks that are not VE.
      image_size: side of the images, for a Flax checkpoint.
      attn_resolutions: sides at which such a network attends.

    Returns:
      `Snapshot`, with arrays in the dtype of the file. Images are (batch, height, width, channels)
      in [-1, 1]; a network that knows classes takes cond={"class_labels": ...} of shape (batch,).
      An iDDPM network is told the nearest step, as by EDM's code.

    Raises:
      ValueError: no file, one that is damaged or names what no network needs (nothing in it is
        run), a class or a key that is not supported, a wrong flag, weights that are not those of
        the configuration, not floating point or not finite.
    """
    file = Path(path)
    found = _pickle.load(file)
    ema = found.get("ema") if type(found) is dict else None
    if type(ema) is _pickle.Node:
        return _snapshot(ema, file)
    if type(found) is dict and "params_ema" in found:
        if sde not in ("vpsde", "subvpsde"):
            raise ValueError(f"sde must be 'vpsde' or 'subvpsde', got {sde!r}")
        _checks.count("image_size", image_size)
        return _score_sde(found, file, sde, image_size, tuple(attn_resolutions))
    if type(found) is not dict or any(type(v) is not _pickle.Tensor for v in found.values()):
        raise ValueError(f"{file} holds neither 'ema', 'params_ema' nor arrays alone")
    if noise_schedule not in ("linear", "cosine"):
        raise ValueError(f"noise_schedule must be 'linear' or 'cosine', got {noise_schedule!r}")
    _checks.count("num_head_channels", num_head_channels)
    _checks.count("num_heads", 1 if num_heads is None else num_heads)
    arrays = {key: tensor.array() for key, tensor in found.items()}
    heads = num_head_channels, num_heads
    return _guided(arrays, file, noise_schedule, heads, use_new_attention_order)


# --- Snapshots of EDM ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ADM:
    """What a snapshot says about an ADM network, by the names and defaults there."""

    img_resolution: int
    in_channels: int = 3
    out_channels: int = 3
    label_dim: int | None = None
    model_channels: int = 192
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    channel_mult_emb: int = 4
    num_blocks: int = 3
    attn_resolutions: tuple[int, ...] | None = (32, 16, 8)

    def module(self) -> UNet2D:
        """The network, which is diffusers' with other names."""
        return _adm(
            [self.model_channels * mult for mult in self.channel_mult],
            [side in (self.attn_resolutions or ()) for side in _sides(self)],
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            layers_per_block=self.num_blocks,
            attention_head_dim=64,
            time_embedding_dim=self.model_channels * self.channel_mult_emb,
            num_class_embeds=self.label_dim,
            norm_num_groups=None,
            attn_norm_num_groups=min(self.model_channels * self.channel_mult[-1] // 4, 32),
            resnet_time_scale_shift="scale_shift",
        )

    def place(self, side: str, i: int, kind: str, j: int) -> str:
        """The block of a snapshot that is one of diffusers'."""
        sizes = _sizes(self)
        if side == "mid":
            return f"dec.{sizes[-1]}_in{j}"
        if kind == "downsamplers":
            return f"enc.{sizes[i + 1]}_down"
        if kind == "upsamplers":
            return f"dec.{sizes[-2 - i]}_up"
        return f"enc.{sizes[i]}_block{j}" if side == "down" else f"dec.{sizes[-1 - i]}_block{j}"


CONFIGURATIONS = {"SongUNet": SongUNet, "DhariwalUNet": ADM}
IGNORED = {"dropout", "label_dropout", "augment_dim"}  # keys that change nothing at inference


def _snapshot(ema: _pickle.Node, file: Path) -> Snapshot:
    modules = _field(ema.state, "_modules", dict, file)
    model = _field(modules, "model", _pickle.Node, file)
    config = _configuration(model, file)
    arrays = {
        key: array
        for key, array in _arrays(model, file).items()
        if not (key.endswith(".resample_filter") or key.startswith("map_augment."))
    }
    if config.num_blocks > len(arrays):  # or one number could keep a machine busy for days
        raise ValueError(f"{file}: {config.num_blocks} blocks, but {len(arrays)} arrays")
    if isinstance(config, ADM):
        top = EDM_TOP | {"conv_in": f"enc.{_sizes(config)[0]}_conv"}
        rename = partial(_rename_adm, top=top, layers=EDM_LAYERS, place=config.place)
        module, last = config.module(), "out_conv"
        if "map_label.weight" in arrays:  # a matrix there, a table in ours
            arrays["map_label.weight"] = arrays["map_label.weight"].T
    else:
        module, rename, last = config, _rename_song, f"dec.{_sizes(config)[0]}_aux_conv"
    if ema.name == "VEPrecond":  # D = x + sigma F: the network predicts -F
        arrays |= {k: -array for k, array in arrays.items() if k.startswith(f"{last}.")}
    # Query, key and value of a feature lie side by side.
    parts = {key: w.reshape(-1, 3, *w.shape[1:]).swapaxes(0, 1) for key, w in _attention(arrays)}
    variables = _variables(module, arrays, parts, rename, file)
    return Snapshot(module, variables, **_preconditioning(ema, file))


def _configuration(model: _pickle.Node, file: Path) -> SongUNet | ADM:
    """The arguments that made the network, with the defaults of its class."""
    if model.name not in CONFIGURATIONS:
        raise ValueError(
            f"{file}: the network must be one of {[*CONFIGURATIONS]}, got {model.name!r}"
        )
    options = _field(model.state, "_init_kwargs", dict, file)
    for key, value in options.items():
        values = value if type(value) in (list, tuple) else [value]
        if len(values) > 64 or any(type(v) not in (int, float, str, bool) for v in values):
            raise ValueError(f"{file}: key {key[:80]!r} must be a few numbers, or text")
    options = {key: None if value in (0, [], ()) else value for key, value in options.items()}
    known = _json.known(CONFIGURATIONS[model.name], options, file)
    if extra := sorted(options.keys() - known.keys() - IGNORED):
        raise ValueError(f"{file}: key {extra[0][:80]!r} is not supported")
    try:
        return CONFIGURATIONS[model.name](**known)
    except TypeError as error:
        raise ValueError(f"{file}: the network's configuration is incomplete: {error}") from error


def _sides(config: SongUNet | ADM) -> list[int]:
    """Of the images at each level."""
    return [config.img_resolution >> i for i in range(len(config.channel_mult))]


def _sizes(config: SongUNet | ADM) -> list[str]:
    """The sides as they are written in names."""
    return [f"{side}x{side}" for side in _sides(config)]


def _rename_song(name: str) -> str:
    """The name in a snapshot of an array of `SongUNet`."""
    match = re.fullmatch(r"((?:enc|dec)\.\w+)(?:\.attention)?\.(.+)\.(\w+)", name)
    return f"{match[1]}.{EDM_LAYERS[match[2]]}.{match[3]}" if match else name


def _preconditioning(ema: _pickle.Node, file: Path) -> dict[str, Any]:
    """Karras et al. 2022, arXiv:2206.00364, table 1, as arguments of `from_linen`."""

    def number(key: str, low: float, high: float) -> float:
        value = ema.state.get(key)
        if type(value) not in (int, float) or not low <= value <= high:
            raise ValueError(f"{file}: {key!r} must be a number from {low} to {high}")
        return float(value)

    match ema.name:
        case "EDMPrecond":
            sigma_data = number("sigma_data", 1e-6, 1e6)
            return {"schedule": schedules.EDM(), "prediction": "edm", "sigma_data": sigma_data}
        case "VEPrecond":
            return {"schedule": LogSigma(), "prediction": "epsilon"}
        case "VPPrecond":
            low = number("beta_min", 1e-6, 1e3)
            schedule = schedules.VPLinear(low, low + number("beta_d", 0.0, 1e3))
            scale = number("M", 2.0, 1e6) - 1
            return {"schedule": schedule, "prediction": "epsilon", "time_scale": scale}
        case "iDDPMPrecond":
            number("C_2", 0.008, 0.008)
            steps, share = int(number("M", 1.0, 1e5)), number("C_1", 1e-9, 0.5)
            schedule = Steps.cosine(steps, 1 - share)
            return {"schedule": schedule, "prediction": "epsilon"}
    known = ["EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond"]
    raise ValueError(f"{file}: the preconditioning must be one of {known}, got {ema.name!r}")


def _field(state: Any, key: str, kind: type, file: Path) -> Any:
    value = state.get(key) if type(state) is dict else None
    if type(value) is not kind:
        raise ValueError(f"{file} is no snapshot: it has no {key!r}")
    return value


def _arrays(model: _pickle.Node, file: Path) -> Arrays:
    """Parameters and buffers by their paths; a module that is there twice is an error."""
    found, seen, rest = {}, set(), [("", model)]
    while rest:
        prefix, node = rest.pop()
        if type(node) is not _pickle.Node or id(node) in seen or len(prefix) > 200:
            raise ValueError(f"{file}: {prefix[:80]!r} is no module of its own")
        seen.add(id(node))
        for kind in ("_parameters", "_buffers"):
            for key, value in _field(node.state, kind, dict, file).items():
                if type(value) is _pickle.Tensor:
                    found[f"{prefix}{key}"] = value.array()
        modules = _field(node.state, "_modules", dict, file)
        rest += [(f"{prefix}{key}.", child) for key, child in modules.items()]
    return found


# --- Weights alone -------------------------------------------------------------------------------


def _shape(arrays: Arrays, file: Path, key: str, rank: int) -> tuple[int, ...]:
    """Of an array that every network has, and none of its sizes 0."""
    if key not in arrays or arrays[key].ndim < rank or not arrays[key].size:
        raise ValueError(f"{file} has no {key!r} of {rank} axes: it is none of these networks")
    return arrays[key].shape


def _guided(
    arrays: Arrays,
    file: Path,
    noise_schedule: str,
    heads: tuple[int, int | None],
    new_order: bool,
) -> Snapshot:
    """A network of guided-diffusion; its arrays say how many there are of everything."""
    shape = partial(_shape, arrays, file)

    def attends(block: str) -> bool:
        return f"{block}.1.qkv.weight" in arrays

    # The first of the output's blocks with a part after its resnet and attention ends a level.
    blocks = {match[1] for key in arrays if (match := re.match(r"(output_blocks\.\d{1,3})\.", key))}
    parts = {".".join(key.split(".")[:3]) for key in arrays}
    ups = [f"output_blocks.{k}.{1 + attends(f'output_blocks.{k}')}" for k in range(len(blocks))]
    goes_up = [up in parts for up in ups]
    n = goes_up.index(True) + 1 if True in goes_up else max(len(blocks), 1)
    levels = len(blocks) // n
    firsts = [f"input_blocks.{1 + i * n}" for i in range(max(levels, 1))]
    features = [shape(f"{block}.0.out_layers.3.weight", 4)[0] for block in firsts]
    (emb,) = shape("input_blocks.1.0.emb_layers.1.bias", 1)
    if shape("input_blocks.0.0.weight", 4)[1] != 3:
        raise ValueError(f"{file}: images must have 3 channels")

    module = _adm(
        features,
        [attends(block) for block in firsts],
        f"input_blocks.{n}.0.op.weight" not in arrays,
        out_channels=shape("out.2.weight", 4)[0],
        layers_per_block=n - 1,
        attention_head_dim=heads[0],
        num_heads=heads[1],
        time_embedding_dim=shape("time_embed.0.weight", 2)[0],
        num_class_embeds=shape("label_emb.weight", 2)[0] if "label_emb.weight" in arrays else None,
        norm_num_groups=32,
        attn_norm_num_groups=32,
        resnet_time_scale_shift="scale_shift" if emb == 2 * features[0] else "default",
    )

    def place(side: str, i: int, kind: str, j: int) -> str:
        if kind == "upsamplers":
            return ups[i * n + n - 1]
        k = {"down": 1 + i * n, "mid": 0, "up": i * n}[side]
        if kind == "downsamplers":
            return f"input_blocks.{k + n - 1}.0"
        if side == "mid":
            return f"middle_block.{1 if kind == 'attentions' else 2 * j}"
        side = {"down": "input_blocks", "up": "output_blocks"}[side]
        return f"{side}.{k + j}.{int(kind == 'attentions')}"

    is_consistency = len(shape("middle_block.1.qkv.weight", 3)) == 4  # of images, not of sequences
    together = is_consistency or new_order  # all queries, all keys, all values; or so in each head

    def split(w: np.ndarray) -> np.ndarray:
        n = 1 if together else heads[1] or len(w) // 3 // heads[0]
        if not n or len(w) % (3 * n):
            raise ValueError(
                f"{file}: num_head_channels={heads[0]}, num_heads={heads[1]} must fit {len(w) // 3}"
            )
        return w.reshape(n, 3, -1, *w.shape[1:]).swapaxes(0, 1).reshape(3, -1, *w.shape[1:])

    qkv = {key: split(w) for key, w in _attention(arrays)}
    rename = partial(_rename_adm, top=OPENAI, layers=OPENAI_LAYERS, place=place)
    variables = _variables(module, arrays, qkv, rename, file)
    if is_consistency:  # it is told 1000 log(sigma) / 4
        return Snapshot(module, variables, schedules.EDM(), "edm", time_scale=1000.0)
    schedule = getattr(schedules.Discrete, noise_schedule)(1000)
    return Snapshot(module, variables, schedule, "epsilon")


# --- Checkpoints of score_sde --------------------------------------------------------------------

LEAVES = {"kernel": "weight", "scale": "weight", "W": "weight", "b": "bias"}  # theirs, torch's
SCORE_SDE_LAYERS = {
    "norm1": "GroupNorm_0",
    "conv1": "Conv_0",
    "time_emb_proj": "Dense_0",
    "norm2": "GroupNorm_1",
    "conv2": "Conv_1",
    "conv_shortcut": "Conv_2",
    "group_norm": "GroupNorm_0",
    "to_q": "NIN_0",
    "to_k": "NIN_1",
    "to_v": "NIN_2",
    "to_out.0": "NIN_3",
}


def _score_sde(
    state: dict[str, Any], file: Path, sde: str, image_size: int, attends: tuple[int, ...]
) -> Snapshot:
    """A network of score_sde: `SongUNet`, whose parts are counted as they are called."""
    arrays = dict(_leaves(state["params_ema"], file))
    shape = partial(_shape, arrays, file)
    names = {name for key in arrays if (name := key.split(".")[0]).startswith("ResnetBlockBigGAN")}
    shapes = [shape(f"ResnetBlockBigGANpp_{k}.Conv_0.weight", 4)[:2] for k in range(len(names))]
    # A shortcut that keeps the features is of a block that resamples, which ends a level.
    ends = [
        k
        for k, (after, before) in enumerate(shapes)
        if after == before and f"ResnetBlockBigGANpp_{k}.Conv_2.weight" in arrays
    ]
    n = ends[0] if ends else max(len(names) - 3, 0) // 2
    levels = len(names) // (2 * n + 3)
    if not levels:
        raise ValueError(f"{file} has too few residual blocks for a network of score_sde")
    width, channels = shape("Conv_0.weight", 4)[:2]
    is_fourier = "GaussianFourierProjection_0.weight" in arrays
    is_residual = "Downsample_0.Conv2d_0.weight" in arrays
    module = SongUNet(
        img_resolution=image_size,
        in_channels=channels,
        out_channels=channels,
        model_channels=width,
        channel_mult=tuple(shapes[i * (n + 1)][0] // width for i in range(levels)),
        channel_mult_emb=shape("Dense_0.bias", 1)[0] // width,
        num_blocks=n,
        attn_resolutions=attends,
        embedding_type="fourier" if is_fourier else "positional",
        channel_mult_noise=2 if is_fourier else 1,
        encoder_type="residual" if is_residual else "standard",
        resample_filter=(1, 3, 3, 1) if is_residual else (1, 1),
    )
    if "opt_state" in state:  # of consistency_models_cifar10
        known = {"schedule": schedules.EDM(), "prediction": "edm"}
    elif is_fourier:  # score = F / sigma: the network predicts -F
        known = {"schedule": LogSigma(), "prediction": "epsilon"}
        arrays |= {k: -array for k, array in arrays.items() if k.startswith("Conv_1.")}
    else:
        schedule = schedules.VPLinear() if sde == "vpsde" else SubVP()
        known = {"schedule": schedule, "prediction": "epsilon", "time_scale": 999.0}
    return Snapshot(module, _variables(module, arrays, {}, _counted(module), file), **known)


def _leaves(tree: Any, file: Path, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Flax's arrays by their paths, named and laid out as torch's."""
    if type(tree) is not dict or len(prefix) > 200:
        raise ValueError(f"{file}: {prefix[:80]!r} is neither parameters nor an array")
    for key, value in tree.items():
        if type(value) is np.ndarray and value.dtype in _pickle.STORAGES.values():
            value = value if value.ndim < 2 else np.moveaxis(value, (-1, -2), (0, 1))
            yield f"{prefix}{LEAVES.get(key, key)}", value
        else:
            yield from _leaves(value, file, f"{prefix}{key}.")


def _counted(module: SongUNet) -> Callable[[str], str]:
    """The name in score_sde of an array of `SongUNet`; in both, parts are called in one order."""
    sizes, n = _sizes(module), module.num_blocks
    attends = [side in (module.attn_resolutions or ()) for side in _sides(module)]
    blocks, attentions = [], []
    for i, size in enumerate(sizes):
        level = [f"enc.{size}_block{j}" for j in range(n)]
        blocks += ([f"enc.{size}_down"] if i else []) + level
        attentions += level if attends[i] else []
    blocks += [f"dec.{sizes[-1]}_in0", f"dec.{sizes[-1]}_in1"]
    attentions += blocks[-2:-1]
    for i, size in reversed([*enumerate(sizes)]):
        level = [f"dec.{size}_block{j}" for j in range(n + 1)]
        blocks += ([f"dec.{size}_up"] if i + 1 < len(sizes) else []) + level
        attentions += level[-1:] if attends[i] else []
    top = {
        "map_noise": "GaussianFourierProjection_0",
        "map_layer0": "Dense_0",
        "map_layer1": "Dense_1",
        f"enc.{sizes[0]}_conv": "Conv_0",
        f"dec.{sizes[0]}_aux_norm": "GroupNorm_0",
        f"dec.{sizes[0]}_aux_conv": "Conv_1",
    }
    top |= {block: f"ResnetBlockBigGANpp_{k}" for k, block in enumerate(blocks)}
    top |= {f"{block}.attention": f"AttnBlockpp_{k}" for k, block in enumerate(attentions)}
    top |= {f"enc.{s}_aux_residual": f"Downsample_{k}.Conv2d_0" for k, s in enumerate(sizes[1:])}

    def rename(name: str) -> str:
        if match := re.fullmatch(r"((?:enc|dec)\.\w+(?:\.attention)?)\.(.+)\.(\w+)", name):
            return f"{top[match[1]]}.{SCORE_SDE_LAYERS[match[2]]}.{match[3]}"
        layer, leaf = name.rsplit(".", 1)
        return f"{top[layer]}.{leaf.replace('freqs', 'weight')}"

    return rename


# --- Both ----------------------------------------------------------------------------------------

# Names of layers: ours, then those of the files.
EDM_TOP = {
    "time_embedding.linear_1": "map_layer0",
    "time_embedding.linear_2": "map_layer1",
    "class_embedding": "map_label",
    "conv_norm_out": "out_norm",
    "conv_out": "out_conv",
}
EDM_LAYERS = {
    "norm1": "norm0",
    "conv1": "conv0",
    "time_emb_proj": "affine",
    "norm2": "norm1",
    "conv2": "conv1",
    "conv_shortcut": "skip",
    "group_norm": "norm2",
    "to_q": "qkv",
    "to_k": "qkv",
    "to_v": "qkv",
    "to_out.0": "proj",
}
OPENAI = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
OPENAI_LAYERS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
    "group_norm": "norm",
    "to_q": "qkv",
    "to_k": "qkv",
    "to_v": "qkv",
    "to_out.0": "proj_out",
    "downsamplers.conv": "op",
    "upsamplers.conv": "conv",
}


def _adm(
    features: list[int], attends: list[bool], resampled: bool = True, **options: Any
) -> UNet2D:
    """ADM (Dhariwal & Nichol 2021, arXiv:2105.05233), as diffusers' `UNet2DModel` has it."""
    plain = "Resnet{}sampleBlock2D" if resampled else "{}Block2D"
    kinds = ["Attn{}Block2D" if attend else plain for attend in attends]
    return UNet2D(
        block_out_channels=tuple(features),
        down_block_types=tuple(kind.format("Down") for kind in kinds),  # pyright: ignore
        up_block_types=tuple(kind.format("Up") for kind in kinds[::-1]),  # pyright: ignore
        downsample_type="resnet" if resampled else "conv",
        upsample_type="resnet" if resampled else "conv",
        **options,
    )


def _rename_adm(
    name: str,
    top: dict[str, str],
    layers: dict[str, str],
    place: Callable[[str, int, str, int], str],
) -> str:
    """The name in a file of an array of `UNet2D`; place names the block that holds it."""
    layer, _, leaf = name.rpartition(".")
    match = re.fullmatch(r"(down|mid|up)_blocks?(?:\.(\d+))?\.(\w+)\.(\d+)\.(.+)", layer)
    if not match:
        return f"{top[layer]}.{leaf}"
    side, i, kind, j, layer = match.groups()
    layer = layers[f"{kind}.conv" if layer == "conv" else layer]
    return f"{place(side, int(i or 0), kind, int(j))}.{layer}.{leaf}"


def _attention(arrays: Arrays) -> list[tuple[str, np.ndarray]]:
    found = [(key, array) for key, array in arrays.items() if key.split(".")[-2:-1] == ["qkv"]]
    return [(key, np.atleast_1d(array)) for key, array in found]


def _variables(
    module: UNet2D | SongUNet,
    arrays: Arrays,
    parts: dict[str, np.ndarray],
    rename: Callable[[str], str],
    file: Path,
) -> dict[str, Any]:
    """Parameters by their paths; parts are query, key and value where the file has them as one."""
    if sum(array.nbytes for array in arrays.values()) > file.stat().st_size:
        raise ValueError(f"{file}: its arrays are larger than the file, as some share their bytes")
    expected = _weights.expected(module, file)
    names = {name: rename(name) for name in expected}
    _weights.check_names(dict.fromkeys(names.values()), arrays, file)
    found = {}
    for name, (path, shape) in expected.items():
        key, stored = names[name], _weights.stored_shape(path, shape)
        which = [f".to_{c}." in name for c in "qkv"]
        array = parts[key][which.index(True)] if key in parts else arrays[key]
        if array.shape[len(stored) :] in ((1,), (1, 1)):  # a convolution over one pixel
            array = array.reshape(array.shape[: len(stored)])
        if array.shape != stored or not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"{file}: {key} must be floating point of shape {stored}, got {array.dtype} "
                f"{array.shape}"
            )
        found[path] = _weights.parameter(array, key, path)
    return {"params": unflatten_dict(found)}
