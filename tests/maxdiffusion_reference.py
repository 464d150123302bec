"""What MaxDiffusion's schedulers return on a closed form, kept in reference/maxdiffusion.npz.

    python tests/maxdiffusion_reference.py path/to/maxdiffusion      # a checkout

Needs that checkout, flax and huggingface_hub; writes the file anew. `test_maxdiffusion.py` compares
with it, and with the checkout itself where the environment variable MAXDIFFUSION has its path.
"""

import importlib
import sys
from pathlib import Path

import numpy as np

FILE = Path(__file__).parent / "reference" / "maxdiffusion.npz"
STEPS = 6
VARIANCES = np.array([[0.04, 0.3, 1.0]])  # of the data, whose mean is 0.5
VP = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
UNIPC = "unipc_multistep_flax FlaxUniPCMultistepScheduler"
DPM = "dpmsolver_multistep_flax FlaxDPMSolverMultistepScheduler"

# Module and class, and options.
CASES = {
    "unipc 1 flow": (UNIPC, FLOW | {"solver_order": 1}),
    "unipc 2 flow": (UNIPC, FLOW | {"solver_order": 2}),
    "unipc 3 flow": (UNIPC, FLOW | {"solver_order": 3}),
    "unipc 2": (UNIPC, VP | {"solver_order": 2}),
    "euler": ("euler_discrete_flax FlaxEulerDiscreteScheduler", VP),
    "euler v": (
        "euler_discrete_flax FlaxEulerDiscreteScheduler",
        VP | {"prediction_type": "v_prediction", "timestep_spacing": "leading"},
    ),
    "flow match": ("flow_match_flax FlaxFlowMatchScheduler", {"shift": 5.0}),
    "rectified flow": ("rectified_flow FlaxRectifiedFlowMultistepScheduler", {}),
    "ddim": ("ddim_flax FlaxDDIMScheduler", VP | {"timestep_spacing": "leading"}),
    "dpm 2": (DPM, VP | {"solver_order": 2}),
    "dpm 3": (DPM, VP | {"solver_order": 3}),
}


def noise():
    return np.random.default_rng(21).standard_normal((4, 3)).astype(np.float32)


def output(prediction, x_t, alpha, sigma):
    """What a perfect network of Gaussian data returns, in NumPy or JAX."""
    gain = alpha * VARIANCES / (alpha**2 * VARIANCES + sigma**2)
    x0 = 0.5 + gain * (x_t - 0.5 * alpha)
    epsilon = (x_t - alpha * x0) / sigma
    return {
        "epsilon": epsilon,
        "sample": x0,
        "v_prediction": alpha * epsilon - sigma * x0,
        "flow_prediction": epsilon - x0,
    }[prediction]


def level(name, state, i):
    """Alpha and sigma of x_t in step i."""
    if "flow" in name:
        t = min(float(state.sigmas[i]), 1 - 1e-6)
        return 1 - t, t
    if hasattr(state, "sigmas") and state.sigmas is not None:
        return 1 / np.hypot(1, float(state.sigmas[i])), np.sin(np.arctan(float(state.sigmas[i])))
    a = float(state.common.alphas_cumprod[int(state.timesteps[i])])
    return a**0.5, (1 - a) ** 0.5


def build(name):
    """A scheduler of theirs; the checkout is in sys.path."""
    (module, cls), options = CASES[name][0].split(), CASES[name][1]
    module = importlib.import_module(f"maxdiffusion.schedulers.scheduling_{module}")
    return getattr(module, cls)(**options)


def given(name):
    return {"samples_shape": (4, 3)} if name == "rectified flow" else {"shape": (4, 3)}


def loop(name, scheduler):
    """Their loop around the closed form; the state after set_timesteps and the last sample."""
    import jax.numpy as jnp

    state = start = scheduler.set_timesteps(
        scheduler.create_state(), num_inference_steps=STEPS, **given(name)
    )
    prediction = getattr(scheduler.config, "prediction_type", "flow_prediction")
    prediction = "flow_prediction" if "flow" in name else prediction
    sample = jnp.asarray(noise()) * getattr(state, "init_noise_sigma", 1.0)
    for i, t in enumerate(state.timesteps):
        x_t = sample
        if hasattr(scheduler, "scale_model_input"):
            x_t = scheduler.scale_model_input(state, sample, t)
        f = jnp.asarray(output(prediction, x_t, *level(name, start, i)), jnp.float32)
        t = t if hasattr(state, "sigmas") else jnp.int32(t)  # as their pipelines do
        sample, state = scheduler.step(state, f, t, sample, return_dict=False)
    return start, np.asarray(sample)


def main():
    sys.path.insert(0, str(Path(sys.argv[1]) / "src"))
    arrays = {}
    for name in CASES:
        state, sample = loop(name, build(name))
        arrays[f"{name}/sample"] = sample
        arrays[f"{name}/timesteps"] = np.asarray(state.timesteps)
        arrays[f"{name}/init_noise_sigma"] = np.asarray(getattr(state, "init_noise_sigma", 1.0))
        if getattr(state, "sigmas", None) is not None:
            arrays[f"{name}/sigmas"] = np.asarray(state.sigmas)
        else:
            arrays[f"{name}/alphas_cumprod"] = np.asarray(state.common.alphas_cumprod)
            last = getattr(state, "final_alpha_cumprod", state.common.alphas_cumprod[0])
            arrays[f"{name}/final_alpha_cumprod"] = np.asarray(last)
        print(name, np.isfinite(sample).all(), sample[0], file=sys.stderr)
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    main()
