"""Checkpoints in the layout of diffusers, read without torch: JSON and safetensors, never pickles.

    checkpoint = load_diffusers("ddpm-cifar10-32")  # a local folder
    denoiser = sd.from_linen(**checkpoint._asdict())
    sigmas = sd.ddpm_sigmas(10, checkpoint.schedule)
    solution = sd.sample(key, denoiser, (16, 32, 32, 3), sigmas=sigmas)

A network of latents denoises latents: decode solution.x with the model's own decoder. One that is
told a text takes its embeddings, from the model's own encoder. It needs the extra `checkpoints`:
flax and safetensors.
"""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from flax.traverse_util import unflatten_dict
from jax import Array
from safetensors import SafetensorError, safe_open

from steindiff_jax.interop import _json, _weights
from steindiff_jax.interop.networks import DiT, UNet2D, UNet2DCondition
from steindiff_jax.interop.schedulers import betas_schedule
from steindiff_jax.protocols import Schedule
from steindiff_jax.schedules import EDM

Module = UNet2D | UNet2DCondition | DiT

WEIGHTS = "diffusion_pytorch_model"


class Checkpoint(NamedTuple):
    """A trained network, named as the arguments of `from_linen`.

    schedule and prediction are None where a network was saved without its scheduler.
    """

    module: Module
    variables: dict[str, Any]
    schedule: Schedule | None
    prediction: str | None


def load_diffusers(path: str | Path) -> Checkpoint:
    """The network, weights, schedule and prediction that diffusers' `save_pretrained` wrote.

    Networks: `UNet2DModel`, `UNet2DConditionModel` as Stable Diffusion 1, 2 and XL have it, and
    `DiTTransformer2DModel`. Schedulers: those with DDPM's betas (the network is told the index of
    its step) and `ScoreSdeVeScheduler` (it is told sigma). What a scheduler does to samples is left
    to the caller: for its `clip_sample` and `thresholding` wrap the denoiser in `StaticThreshold`
    or `DynamicThreshold`.

    Args:
      path: folder of a pipeline (unet or transformer, and scheduler inside it), or of a network
        alone: config.json, safetensors, perhaps scheduler_config.json.

    Returns:
      `Checkpoint`, with arrays in the dtype of the file. Images are (batch, height, width,
      channels); a network that knows classes takes cond={"class_labels": ...}, one that is told
      a text cond={"encoder_hidden_states": ...}, with XL also "text_embeds" and "time_ids".

    Raises:
      ValueError: nothing to read at path, a class or a key of a configuration that is not supported
        (it says which), weights in a pickle (.bin, .ckpt, .pt: reading one may run code), weights
        that are not those of the configuration, not floating point or not finite, damaged files.
    """
    folder, scheduler = _layout(Path(path))
    config = folder / "config.json"
    module = _network(config)
    variables = _variables(module, config, _files(folder))
    schedule, prediction = _schedule(scheduler) if scheduler else (None, None)
    return Checkpoint(module, variables, schedule, prediction)


# --- Files ---------------------------------------------------------------------------------------


def _layout(path: Path) -> tuple[Path, Path | None]:
    """The folder of the network, and the scheduler's configuration."""
    for folder in (path, path / "unet", path / "transformer"):
        if (folder / "config.json").is_file():
            break
    else:
        raise ValueError(
            f"no config.json in {path}, {path / 'unet'} or {path / 'transformer'}: path must be a "
            "local folder that save_pretrained of diffusers wrote"
        )
    places = [path / "scheduler_config.json", path / "scheduler" / "scheduler_config.json"]
    return folder, next((place for place in places if place.is_file()), None)


def _files(folder: Path) -> list[Path]:
    single = folder / f"{WEIGHTS}.safetensors"
    files = [single] if single.is_file() else sorted(folder.glob(f"{WEIGHTS}-*-of-*.safetensors"))
    if files:
        return files
    found = sorted(file.name for file in folder.iterdir() if file.name != "config.json")
    raise ValueError(
        f"{folder} has no {single.name}, only {found}. Pickles (.bin, .ckpt, .pt) may run code and "
        "are not read: load one that you trust with diffusers and save_pretrained it again"
    )


# --- Configurations ------------------------------------------------------------------------------

NETWORKS = {
    "UNet2DModel": UNet2D,
    "UNet2DConditionModel": UNet2DCondition,
    "DiTTransformer2DModel": DiT,
    "Transformer2DModel": DiT,
}

# Keys that change nothing at inference, where they are no fields of the network.
IGNORED = {
    "addition_embed_type_num_heads",
    "dropout",
    "mid_block_only_cross_attention",
    "norm_num_groups",
    "sample_size",
    "upcast_attention",
}
# What keys must say that are no fields: for a Transformer2DModel, the older class, to be a DiT, and
# for a UNet2DConditionModel to be a Stable Diffusion.
FIXED = {
    UNet2D: {},
    UNet2DCondition: {
        "act_fn": "silu",
        "attention_type": "default",
        "center_input_sample": False,
        "class_embed_type": None,
        "class_embeddings_concat": False,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "cross_attention_norm": None,
        "downsample_padding": 1,
        "dual_cross_attention": False,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "num_attention_heads": None,
        "num_class_embeds": None,
        "only_cross_attention": False,
        "resnet_out_scale_factor": 1,
        "resnet_skip_time_act": False,
        "resnet_time_scale_shift": "default",
        "reverse_transformer_layers_per_block": None,
        "time_cond_proj_dim": None,
        "time_embedding_act_fn": None,
        "time_embedding_dim": None,
        "time_embedding_type": "positional",
        "timestep_post_act": None,
    },
    DiT: {
        "attention_type": "default",
        "cross_attention_dim": None,
        "double_self_attention": False,
        "num_vector_embeds": None,
        "only_cross_attention": False,
        "use_linear_projection": False,
    },
}
# Fields that say how many times a block is repeated.
DEPTHS = ("num_layers", "layers_per_block", "transformer_layers_per_block")


@dataclasses.dataclass(frozen=True)
class Betas:
    """What a scheduler's configuration says about the network; the rest of it is about solvers."""

    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    predict_epsilon: Literal[True] | None = None
    timestep_type: Literal["discrete"] | None = None
    use_flow_sigmas: Literal[False] | None = None


SCHEDULERS = (
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)


def _network(file: Path) -> Module:
    config = _json.load(file)
    cls = config.get("_class_name")
    if cls not in [*NETWORKS]:  # JSON may hold what cannot be hashed
        raise ValueError(f"{file}: '_class_name' must be one of {[*NETWORKS]}, got {cls!r}")
    for key in ("down_block_types", "up_block_types"):
        if isinstance(config.get(key), list):  # they were called UNetRes... at first
            config[key] = [str(kind).removeprefix("UNetRes") for kind in config[key]]
    network = NETWORKS[cls]
    known, fixed = _json.known(network, config, file), FIXED[network]
    for key in sorted(config.keys() - known.keys() - IGNORED):
        if not (key.startswith("_") or (key in fixed and config[key] == fixed[key])):
            raise ValueError(f"{file}: key {key!r} = {config[key]!r} is not supported")
    return network(**known)


def _schedule(file: Path) -> tuple[Schedule, str]:
    config = _json.load(file)
    cls = config.get("_class_name")
    if cls == "ScoreSdeVeScheduler":
        return EDM(), "score"
    if cls not in SCHEDULERS:
        raise ValueError(
            f"{file}: '_class_name' must be one of {[*SCHEDULERS, 'ScoreSdeVeScheduler']}, got "
            f"{cls!r}; without {file.name} the network loads alone, with a schedule of your own"
        )
    known = Betas(**_json.known(Betas, config, file))
    schedule = betas_schedule(known, file)
    names = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}
    return schedule, names[known.prediction_type]


# --- Weights -------------------------------------------------------------------------------------

# Names in diffusers' first attention blocks, which networks published then still have.
RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
FLOATING = ("F64", "F32", "F16", "BF16")


def _name(key: str) -> str:
    key = re.sub(
        r"(attentions\.\d+)\.(query|key|value|proj_attn)\.",
        lambda match: f"{match[1]}.{RENAMED[match[2]]}.",
        key,
    )
    return "time_proj.weight" if key == "time_proj.W" else key


def _variables(module: Module, config: Path, files: list[Path]) -> dict[str, Any]:
    """Parameters by their paths; each file is read once its shapes are known to be right."""
    try:
        handles = [safe_open(file, framework="numpy") for file in files]
        found = {_name(key): (file, key) for file in handles for key in file.keys()}  # noqa: SIM118
        depths = [getattr(module, key, 1) for key in DEPTHS]
        layers = math.prod(max(jax.tree.leaves(depth)) for depth in depths)
        if layers > len(found):  # or one number in the JSON could keep a machine busy for days
            raise ValueError(f"{config}: {layers} layers, but the weights are {len(found)} arrays")
        expected = _weights.expected(module, config)
        _weights.check_names(expected, found, files[0].parent)
        return {
            "params": unflatten_dict(
                {path: _array(*found[key], path, shape) for key, (path, shape) in expected.items()}
            )
        }
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{files[0].parent}: damaged safetensors: {error}") from error


def _array(handle: Any, key: str, path: tuple[str, ...], shape: tuple[int, ...]) -> Array:
    """One parameter, whose shape is known to be right before it is read."""
    piece, stored = handle.get_slice(key), _weights.stored_shape(path, shape)
    if tuple(piece.get_shape()) != stored or piece.get_dtype() not in FLOATING:
        raise ValueError(
            f"{key} must be floating point of shape {stored}, got {piece.get_dtype()} "
            f"{tuple(piece.get_shape())}"
        )
    return _weights.parameter(handle.get_tensor(key), key, path)
