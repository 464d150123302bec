"""What networks of EDM, guided-diffusion and consistency models return, in reference/edm.npz.

    python tests/edm_reference.py edm guided-diffusion consistency_models   # paths of checkouts

Needs these, torch and einops; writes the file anew. EDM's code is run, not copied, and nothing of
it is kept: names and shapes of arrays, the arguments that made the network, and outputs. Weights
and inputs are drawn by rules that need numpy alone, so that the tests need no torch.
"""

import json
import sys
import types
from functools import partial
from pathlib import Path

import numpy as np
from diffusers_reference import draw

FILE = Path(__file__).parent / "reference" / "edm.npz"

DDPMPP = {
    "model_type": "SongUNet",
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
}
NCSNPP = DDPMPP | {
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "decoder_type": "standard",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}
DHARIWAL = DDPMPP | {"model_type": "DhariwalUNet", "model_channels": 64}

# Class and arguments of EDM's networks, around the noise levels of the denoiser's calls.
SNAPSHOTS = {
    "ddpmpp edm": ("EDMPrecond", DDPMPP | {"label_dim": 3, "augment_dim": 9}),
    "ncsnpp edm": ("EDMPrecond", NCSNPP | {"num_blocks": 2, "sigma_data": 0.25}),
    "ddpmpp vp": (
        "VPPrecond",
        DDPMPP | {"channel_mult": [2, 2, 2], "attn_resolutions": [], "channel_mult_emb": 2},
    ),
    "ncsnpp ve": ("VEPrecond", NCSNPP | {"label_dim": 3}),
    "adm edm": ("EDMPrecond", DHARIWAL | {"label_dim": 3, "augment_dim": 9}),
    "adm iddpm": ("iDDPMPrecond", DHARIWAL | {"channel_mult": [1, 2, 1], "num_blocks": 2}),
    "adm ve": ("VEPrecond", DHARIWAL | {"channel_mult": [1]}),
}
OPENAI = {
    "image_size": 64,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2",
    "num_head_channels": 16,
    "attention_resolutions": "32",
    "resblock_updown": True,
}
FLAGS = ("noise_schedule", "num_head_channels", "num_heads", "use_new_attention_order")
GUIDED = {
    "adm 64": {"learn_sigma": True, "noise_schedule": "cosine", "use_new_attention_order": True}
    | {"class_cond": True},
    "adm 128": {"learn_sigma": True, "num_head_channels": -1, "num_heads": 4, "class_cond": True}
    | {"attention_resolutions": "64,32"},
    "adm 256": {"learn_sigma": True, "num_res_blocks": 2},
    "conv": {"resblock_updown": False, "use_scale_shift_norm": False, "channel_mult": "1,2,2"}
    | {"attention_resolutions": "64,32"},
    "one level": {"channel_mult": "1", "attention_resolutions": "64"},
}
CONSISTENCY = {
    "imagenet64": {"class_cond": True},
    "lsun256": {"use_scale_shift_norm": False, "num_res_blocks": 2},
}
SIGMAS = (0.1, 1.0, 3.0)
SIDE = 8
LABELS = np.array([1, 2])


def inputs():
    """Two images of noise, (2, 8, 8, 3); x is these times sqrt(1 + sigma^2)."""
    return np.float32(np.random.default_rng(0).standard_normal((2, SIDE, SIDE, 3)))


# --- With their code -----------------------------------------------------------------------------


def fill(module):
    """Draw the parameters, and EDM's frequencies; their shapes."""
    import torch

    arrays = dict(module.state_dict())
    shapes = {key: tuple(a.shape) for key, a in arrays.items() if "resample_filter" not in key}
    drawn = {key: torch.from_numpy(draw(key, shapes[key])) for key in shapes if key != "u"}
    module.load_state_dict(arrays | drawn)
    module.eval().requires_grad_(False)
    return {key: shapes[key] for key in drawn}


def call(function, x):
    """A function of torch's images at numpy's."""
    import torch

    return function(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()


def snapshot(networks, name):
    """An object of EDM with drawn weights, what of it tells the configuration, and its arrays."""
    cls, options = SNAPSHOTS[name]
    net = getattr(networks, cls)(img_resolution=SIDE, img_channels=3, **options)
    shapes = fill(net)
    state = {k: v for k, v in vars(net).items() if type(v) in (int, float, bool)}
    config = {
        "class": cls,
        "state": {k: v for k, v in state.items() if k[0] != "_" and v != float("inf")},
        "model": options["model_type"],
        "arguments": dict(net.model._init_kwargs),
        "shapes": shapes,
        "sigmas": [float(net.round_sigma(sigma)) for sigma in SIGMAS],
    }
    return net, config


def edm(folder):
    import torch

    sys.path.insert(0, folder)
    from training import networks

    for name in SNAPSHOTS:
        net, config = snapshot(networks, name)
        labels = torch.eye(3)[LABELS] if net.label_dim else None

        def denoise(x, sigma, net=net, labels=labels):
            return net(x, torch.full((2,), sigma), labels)

        config["times"] = told = []
        net.model.register_forward_pre_hook(
            lambda _, args, told=told: told.append(args[1][0].item())
        )
        sigmas = np.float32(config["sigmas"])
        outputs = [call(partial(denoise, sigma=s), inputs() * np.hypot(1, s)) for s in sigmas]
        yield f"edm {name}", config, outputs


def openai(script_util, more):
    """A network of theirs with our weights: its options, shapes and labels, and their sampler."""
    import torch

    options = script_util.model_and_diffusion_defaults() | OPENAI | more
    module, diffusion = script_util.create_model_and_diffusion(**options)
    shapes = fill(module)
    labels = {"y": torch.from_numpy(LABELS)} if options["class_cond"] else {}
    return options, module, diffusion, shapes, labels


def guided_diffusion(folder):
    import torch

    sys.path.insert(0, folder)
    from guided_diffusion import script_util

    for name, more in GUIDED.items():
        options, module, diffusion, shapes, labels = openai(script_util, more)
        outputs, ratios = [], []
        for t in (100, 400):
            alpha = diffusion.alphas_cumprod[t] ** 0.5
            ratios.append(float((1 - alpha**2) ** 0.5 / alpha))

            def denoise(x, t=t, module=module, diffusion=diffusion, labels=labels):
                step = torch.full((2,), t)
                found = diffusion.p_mean_variance(
                    module, x, step, clip_denoised=False, model_kwargs=labels
                )
                return found["pred_xstart"]

            outputs.append(call(denoise, inputs()))  # that is alpha times the x of the others
        unused = "num_heads" if options["num_head_channels"] > 0 else "num_head_channels"
        flags = {key: options[key] for key in FLAGS if key != unused}
        yield f"guided {name}", {"shapes": shapes, "sigmas": ratios, "flags": flags}, outputs


def consistency_models(folder):
    """With attention as flash-attention defines it, since that needs a GPU."""
    import torch
    import torch._dynamo  # which looks for the modules replaced below

    class FlashAttention(torch.nn.Module):
        def __init__(self, **_):
            super().__init__()

        def forward(self, qkv, **_):
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, positions, features)
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            return y.permute(0, 2, 1, 3), None

    flash = types.ModuleType("flash_attn.flash_attention")
    flash.FlashAttention = FlashAttention
    crops, losses = types.ModuleType("torchvision.transforms"), types.ModuleType("piq")
    crops.RandomCrop = losses.LPIPS = lambda *_, **__: None  # of its training
    for fake in (flash, crops, losses):
        sys.modules[fake.__name__] = sys.modules[fake.__name__.split(".")[0]] = fake
    sys.modules["cm.dist_util"] = types.ModuleType("cm.dist_util")  # it needs MPI
    sys.path.insert(0, folder)
    from cm import script_util

    for name, more in CONSISTENCY.items():
        options, module, diffusion, shapes, labels = openai(script_util, more)

        def denoise(x, sigma, module=module, diffusion=diffusion, labels=labels):
            return diffusion.denoise(module, x, torch.full((2,), sigma), **labels)[1]

        outputs = [
            call(partial(denoise, sigma=s), inputs() * np.hypot(1, s)) for s in np.float32(SIGMAS)
        ]
        flags = {"num_head_channels": options["num_head_channels"]}
        config = {"shapes": shapes, "sigmas": list(SIGMAS), "flags": flags}
        yield f"consistency {name}", config, outputs


def main(edm_code, guided_code, consistency_code):
    arrays = {}
    for name, config, outputs in (
        *edm(edm_code),
        *guided_diffusion(guided_code),
        *consistency_models(consistency_code),
    ):
        arrays[f"{name}/config"], arrays[f"{name}/outputs"] = json.dumps(config), np.stack(outputs)
        print(name, len(config["shapes"]), [f"{o.std():.3f}" for o in outputs], file=sys.stderr)
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
