"""What networks of score_sde and consistency_models_cifar10 return, in reference/score_sde.npz.

    python tests/score_sde_reference.py score_sde consistency_models_cifar10   # paths of checkouts

Their Flax models and equations are run in float64, at float32 weights and inputs that rules draw;
kept are names and shapes of arrays, flags, noise levels and outputs.
"""

import json
import sys
import types
from pathlib import Path

import numpy as np
from diffusers_reference import draw
from edm_reference import inputs

FILE = Path(__file__).parent / "reference" / "score_sde.npz"

MODEL = {
    "nf": 8,
    "ch_mult": (1, 2),
    "num_res_blocks": 1,
    "attn_resolutions": (4,),
    "embedding_type": "positional",
    "progressive_input": "none",
    "fir": False,
    "scale_by_sigma": False,
    # All of their configurations for CIFAR-10 in continuous time share the rest.
    "conditional": True,
    "fir_kernel": (1, 3, 3, 1),
    "skip_rescale": True,
    "resblock_type": "biggan",
    "progressive": "none",
    "progressive_combine": "sum",
    "resamp_with_conv": True,
    "fourier_scale": 16,
    "init_scale": 0.0,
    "dropout": 0.1,
    "nonlinearity": "swish",
    "normalization": "GroupNorm",
    "sigma_min": 0.01,
    "sigma_max": 50,
    "num_scales": 1000,
    "double_heads": False,
}
NCSNPP = MODEL | {"progressive_input": "residual", "fir": True}
VE = NCSNPP | {"embedding_type": "fourier", "scale_by_sigma": True}
TIMES = {"vpsde": (0.03, 0.26, 0.48), "subvpsde": (0.1, 0.3, 0.5), "vesde": (0.2, 0.5, 0.7)}
CASES = {
    "ddpmpp vp": ("vpsde", MODEL),
    "ncsnpp vp": ("vpsde", NCSNPP | {"num_res_blocks": 2, "attn_resolutions": (8, 2)}),
    "ddpmpp subvp": ("subvpsde", MODEL | {"ch_mult": (2, 2, 2)}),
    "one level": ("vpsde", MODEL | {"ch_mult": (1,), "attn_resolutions": (8,)}),
    "ncsnpp ve": ("vesde", VE | {"num_res_blocks": 2}),
}
CONSISTENCY = VE | {"scale_by_sigma": False}


def weights(shapes):
    """Arrays by their paths, as `flatten_dict` has them; drawn as torch would lay them out."""
    found = {}
    for path, shape in shapes.items():
        name = f"{path}ias" if path.endswith("/b") else path
        turned = draw(name, (*shape[:-3:-1], *shape[:-2]) if len(shape) > 1 else tuple(shape))
        found[path] = turned if len(shape) < 2 else np.moveaxis(turned, (0, 1), (-1, -2))
    return found


# --- With their code -----------------------------------------------------------------------------


def network(net, options, centered):
    """One of their modules with drawn parameters; their shapes."""
    import jax
    import jax.numpy as jnp
    from flax.traverse_util import flatten_dict, unflatten_dict

    module = net(
        types.SimpleNamespace(
            model=types.SimpleNamespace(**options),
            data=types.SimpleNamespace(centered=centered),
            training=types.SimpleNamespace(continuous=True),
        )
    )
    x = jnp.asarray(inputs(), float)
    made = jax.eval_shape(lambda: module.init(jax.random.key(0), x, jnp.ones(2), train=False))
    shapes = {path: a.shape for path, a in flatten_dict(made["params"], sep="/").items()}
    drawn = {path: jnp.asarray(a, float) for path, a in weights(shapes).items()}
    return module, unflatten_dict(drawn, sep="/"), shapes


def fake(name, **contents):
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(contents)


def score_sde(folder):
    import flax
    import flax.training.checkpoints  # which looks for tensorflow itself
    import jax.numpy as jnp

    fake("ml_collections", ConfigDict=object)
    fake("tensorflow")
    flax.optim = types.SimpleNamespace(Optimizer=object)  # which Flax has no more
    sys.path.insert(0, folder)
    import sde_lib
    from models import ncsnpp, utils

    sdes = {"vpsde": sde_lib.VPSDE, "subvpsde": sde_lib.subVPSDE, "vesde": sde_lib.VESDE}
    for name, (kind, options) in CASES.items():
        module, params, shapes = network(ncsnpp.NCSNpp, options, centered=kind != "vesde")
        sde = sdes[kind]()
        score = utils.get_score_fn(sde, module, params, {}, continuous=True)
        sigmas, outputs = [], []
        for t in TIMES[kind]:
            times = jnp.full(2, t)
            alpha, std = (float(a.ravel()[0]) for a in sde.marginal_prob(jnp.ones((2, 1)), times))
            if kind == "vesde":  # of pixels in [0, 1]
                sigmas.append(2 * std)
                x = np.float64(inputs() * np.hypot(1, np.float32(sigmas[-1])))
                y = (x + 1) / 2
                outputs.append(2 * (y + std**2 * score(y, times)) - 1)
            else:
                sigmas.append(std / alpha)
                x = np.float64(inputs() * np.hypot(1, np.float32(sigmas[-1])))
                outputs.append((alpha * x + std**2 * score(alpha * x, times)) / alpha)
        flags = {"image_size": inputs().shape[1], "attn_resolutions": options["attn_resolutions"]}
        flags |= {} if kind == "vesde" else {"sde": kind}
        yield name, {"shapes": shapes, "sigmas": sigmas, "flags": flags}, outputs


def consistency_models(folder):
    import jax.numpy as jnp

    fake("blobfile")
    fake("haiku")
    sys.path.insert(0, folder)
    from jcm import sde_lib
    from jcm.models import ncsnpp, utils

    module, params, shapes = network(ncsnpp.NCSNpp, CONSISTENCY, centered=True)
    denoise = utils.get_denoiser_fn(sde_lib.KVESDE(), module, params, {})
    sigmas = [0.1, 1.0, 3.0]
    outputs = [
        denoise(np.float64(inputs() * np.hypot(1, np.float32(s))), jnp.full(2, s)) for s in sigmas
    ]
    flags = {"image_size": 8, "attn_resolutions": CONSISTENCY["attn_resolutions"]}
    yield "consistency", {"shapes": shapes, "sigmas": sigmas, "flags": flags}, outputs


def main(score_code, consistency_code):
    import jax

    jax.config.update("jax_enable_x64", True)
    arrays = {}
    for name, config, outputs in (*score_sde(score_code), *consistency_models(consistency_code)):
        arrays[f"{name}/config"] = json.dumps(config)
        arrays[f"{name}/outputs"] = np.float32(outputs)
        print(name, len(config["shapes"]), config["sigmas"], [f"{o.std():.3f}" for o in outputs])
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
