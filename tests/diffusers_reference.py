"""What diffusers' networks and schedulers return, kept in reference/diffusers.npz.

    python tests/diffusers_reference.py      # needs torch and diffusers; writes the file anew

For each configuration: the `config.json` that `save_pretrained` wrote, names and shapes of the
arrays in its safetensors, and the network's float32 output. Weights and inputs are drawn by rules
below that need numpy alone, so that the tests need no torch, and no weights are kept.
"""

import json
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np

FILE = Path(__file__).parent / "reference" / "diffusers.npz"
WEIGHTS = "diffusion_pytorch_model.safetensors"

SMALL = {"norm_num_groups": 4, "layers_per_block": 1, "attention_head_dim": 8}
ONE_LEVEL = {
    **SMALL,
    "block_out_channels": (8,),
    "down_block_types": ("AttnDownBlock2D",),
    "up_block_types": ("AttnUpBlock2D",),
}
ADM = {
    **SMALL,
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
}
NCSNPP = {
    "block_out_channels": (32, 32, 32),
    "layers_per_block": 1,
    "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"),
    "up_block_types": ("SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"),
    "mid_block_scale_factor": 2**0.5,
    "norm_num_groups": None,
    "attention_head_dim": None,
    "norm_eps": 1e-6,
    "time_embedding_type": "fourier",
    "center_input_sample": True,
}
STABLE = {  # Stable Diffusion: what its three kinds have in common
    **SMALL,
    "block_out_channels": (8, 16),
    "cross_attention_dim": 12,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}

# Class, keys of its configuration, height and width of the input.
CONFIGS = {
    "ddpm-cifar10": (  # the blocks of google/ddpm-cifar10-32
        "UNet2DModel",
        {
            **SMALL,
            "attention_head_dim": None,
            "block_out_channels": (8, 16, 16, 16),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "downsample_padding": 0,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "norm_eps": 1e-6,
        },
        (16, 8),
    ),
    "ddpm-celebahq": (  # those of google/ddpm-celebahq-256 and the LSUN networks
        "UNet2DModel",
        {
            **SMALL,
            "attention_head_dim": None,
            "block_out_channels": (8, 8, 12, 12, 16, 16),
            "down_block_types": (*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
            "downsample_padding": 0,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "norm_eps": 1e-6,
        },
        (32, 32),
    ),
    "adm-imagenet64": (
        "UNet2DModel",
        {**ADM, "num_class_embeds": 10, "attn_norm_num_groups": 2},
        (8, 8),
    ),
    "adm-lsun": ("UNet2DModel", {**ADM, "mid_block_scale_factor": 1.5}, (4, 8)),
    "ncsnpp": ("UNet2DModel", NCSNPP, (8, 8)),
    "class timestep": (
        "UNet2DModel",
        {**ONE_LEVEL, "class_embed_type": "timestep", "act_fn": "mish"},
        (4, 4),
    ),
    "class identity": (
        "UNet2DModel",
        {**ONE_LEVEL, "class_embed_type": "identity", "act_fn": "gelu", "time_embedding_dim": 20},
        (4, 4),
    ),
    "learned time": (
        "UNet2DModel",
        {
            **ONE_LEVEL,
            "time_embedding_type": "learned",
            "num_train_timesteps": 1000,
            "act_fn": "relu",
            "add_attention": False,
        },
        (4, 4),
    ),
    "no middle": (
        "UNet2DModel",
        {**ONE_LEVEL, "block_out_channels": (9,), "norm_num_groups": 3, "mid_block_type": None}
        | {"attention_head_dim": 3, "act_fn": "swish", "layers_per_block": 2},
        (4, 4),
    ),
    "learned variance": (
        "UNet2DModel",
        {
            **SMALL,
            "attention_head_dim": 4,
            "in_channels": 2,
            "out_channels": 4,
            "block_out_channels": (8, 16),
            "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
        },
        (4, 4),
    ),
    "DiT-XL-2": (  # facebook/DiT-XL-2-256
        "DiTTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "out_channels": 8,
            "sample_size": 8,
            "num_embeds_ada_norm": 10,
        },
        (8, 8),
    ),
    "DiT, other choices": (
        "DiTTransformer2DModel",
        {
            "num_attention_heads": 1,
            "attention_head_dim": 12,
            "num_layers": 1,
            "in_channels": 3,
            "sample_size": 6,
            "patch_size": 3,
            "num_embeds_ada_norm": 10,
            "norm_elementwise_affine": True,
            "norm_eps": 1e-3,
            "activation_fn": "gelu",
            "attention_bias": False,
        },
        (12, 12),
    ),
    "stable diffusion 1": ("UNet2DConditionModel", {**STABLE, "attention_head_dim": 2}, (4, 8)),
    "stable diffusion 2": (
        "UNet2DConditionModel",
        {
            **STABLE,
            "layers_per_block": 2,
            "attention_head_dim": (1, 4),
            "use_linear_projection": True,
            "upcast_attention": True,
        },
        (8, 4),
    ),
    "stable diffusion xl": (
        "UNet2DConditionModel",
        {
            **STABLE,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": (1, 2),
            "transformer_layers_per_block": (1, 2),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 10 + 6 * 8,
        },
        (4, 4),
    ),
}

SCHEDULES = {
    "linear": {},
    "scaled_linear": {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "prediction_type": "v_prediction",
    },
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"},
    "trained": {"trained_betas": [0.1, 0.2, 0.4], "num_train_timesteps": 3},
    "zero terminal snr": {"rescale_betas_zero_snr": True},
}
# Networks sampled with DDIM and their schedulers, with which a random network keeps states near 1.
TRAJECTORIES = {
    "learned variance": {"beta_end": 0.002},
    "DiT-XL-2": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    "stable diffusion xl": {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"},
}
DDIM_STEPS = 8
GUIDANCE = 3.0


def draw(name, shape):
    """The float32 array called `name`: of the size that keeps activations near 1, norms not 1."""
    z = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("bias"):
        return np.float32(0.1 * z)
    return np.float32(1 + 0.1 * z if len(shape) == 1 else z / np.sqrt(np.prod(shape[1:])))


def inputs(config, size):
    """The x (2, height, width, channels), t (2,) and labels, or text, of one call."""
    rng = np.random.default_rng(0)
    x = np.float32(rng.standard_normal((2, *size, config["in_channels"])))
    t = np.array([0.75, 30.0] if config.get("time_embedding_type") == "fourier" else [999.0, 3.0])
    if "cross_attention_dim" in config:
        return x, np.float32(t), *text(config, rng)
    if config.get("class_embed_type") == "identity":
        labels = np.float32(rng.standard_normal((2, config["time_embedding_dim"])))
    elif config.get("class_embed_type") == "timestep":
        labels = np.float32([2, 700])
    else:
        classes = config.get("num_class_embeds") or config.get("num_embeds_ada_norm")
        labels = classes and np.array([7, 0 if "num_class_embeds" in config else classes])
    return x, np.float32(t), labels


def text(config, rng):
    """Embeddings of two texts, (2, tokens, width), and for XL pooled ones and the time ids."""
    sequence = np.float32(rng.standard_normal((2, 5, config["cross_attention_dim"])))
    if config["addition_embed_type"] is None:
        return (sequence,)
    ids = np.float32([[1024, 1024, 0, 0, 1024, 1024], [512, 768, 16, 8, 1024, 768]])
    width = config["projection_class_embeddings_input_dim"]
    width -= ids.shape[1] * config["addition_time_embed_dim"]
    return sequence, np.float32(rng.standard_normal((2, width))), ids


def start(config):
    """The x (2, 8, 8, channels) of a trajectory and its conditions: the second is for guidance."""
    rng = np.random.default_rng(1)
    x = np.float32(rng.standard_normal((2, 8, 8, config["in_channels"])))
    if "cross_attention_dim" in config:
        sequence, *added = text(config, rng)
        null = (0 * sequence, *(0 * pooled for pooled in added[:1]), *added[1:])
        return x, (sequence, *added), null
    return x, ((np.array([1, 2]),) if "num_embeds_ada_norm" in config else ())


# --- With diffusers ------------------------------------------------------------------------------


def build(name):
    """The torch module with drawn weights."""
    import diffusers
    import torch

    cls, options, _ = CONFIGS[name]
    module = getattr(diffusers, cls)(**options).eval().requires_grad_(False)
    shapes = {key: tuple(array.shape) for key, array in module.state_dict().items()}
    module.load_state_dict({key: torch.from_numpy(draw(key, shapes[key])) for key in shapes})
    return module


def call(module, x, t, *cond):
    """The torch module on NHWC arrays of numpy, without its learned variance."""
    import torch

    t = torch.from_numpy(t)
    t = t.long() if module.config.get("time_embedding_type") == "learned" else t
    cond = [None if c is None else torch.from_numpy(c) for c in cond]
    if "cross_attention_dim" in module.config:
        added = dict(zip(("text_embeds", "time_ids"), cond[1:], strict=False))
        options = {"encoder_hidden_states": cond[0], "added_cond_kwargs": added}
    else:
        options = {"class_labels": cond[0] if cond else None}
    y = module(torch.from_numpy(x).permute(0, 3, 1, 2), t, **options).sample
    return y[:, : x.shape[-1]].permute(0, 2, 3, 1).numpy()


def ddim(module, **options):
    """States of diffusers' DDIM loop, (steps + 1, 2, 8, 8, channels), and its time steps."""
    import diffusers
    import torch

    scheduler = diffusers.DDIMScheduler(clip_sample=False, **options)
    scheduler.set_timesteps(DDIM_STEPS)
    x, *conds = start(module.config)
    states = [x]
    for t in scheduler.timesteps:
        times = np.full(2, float(t), np.float32)
        f, *others = [call(module, x, times, *cond) for cond in conds]
        for other in others:
            f = other + GUIDANCE * (f - other)
        x = scheduler.step(torch.from_numpy(f), t, torch.from_numpy(x)).prev_sample.numpy()
        states.append(x)
    return np.stack(states), scheduler.timesteps.numpy()


def main():
    import diffusers
    from safetensors import safe_open

    arrays = {}
    for name, (_, _, size) in CONFIGS.items():
        module = build(name)
        with tempfile.TemporaryDirectory() as folder:
            module.save_pretrained(folder)
            config = json.loads((Path(folder) / "config.json").read_text())
            with safe_open(Path(folder) / WEIGHTS, "numpy") as file:
                shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        arrays[f"{name}/config"] = json.dumps(config)
        arrays[f"{name}/shapes"] = json.dumps(shapes)
        arrays[f"{name}/output"] = call(module, *inputs(config, size))
        print(name, len(shapes), arrays[f"{name}/output"].std(), file=sys.stderr)
    for name, options in TRAJECTORIES.items():
        states, steps = ddim(build(name), **options)
        arrays[f"{name}/ddim"], arrays[f"{name}/timesteps"] = states, steps
        print(name, np.abs(states).max(axis=(1, 2, 3, 4)), file=sys.stderr)
    for name, options in SCHEDULES.items():
        scheduler = diffusers.DDIMScheduler(**options)
        arrays[f"schedule {name}/config"] = scheduler.to_json_string()
        arrays[f"schedule {name}/alphas_cumprod"] = scheduler.alphas_cumprod.numpy()
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    main()
