"""What guiders and schedulers of diffusers and samplers of k-diffusion return: reference/peers.npz.

    python tests/peers_reference.py k-diffusion/k_diffusion/sampling.py

Needs torch, scipy and diffusers, and that file of k-diffusion; writes the arrays anew. Noise and
inputs are drawn by rules below that need numpy alone. All in float64.
"""

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np

FILE = Path(__file__).parent / "reference" / "peers.npz"

# --- Guiders -------------------------------------------------------------------------------------

SCALE = 4.0
# Class and options; the formulation of their papers, as `sd.guided` has it.
GUIDERS = {
    "plain": ("ClassifierFreeGuidance", {"guidance_scale": SCALE}),
    "rescale": ("ClassifierFreeGuidance", {"guidance_scale": SCALE, "guidance_rescale": 0.7}),
    "APG": (
        "AdaptiveProjectedGuidance",
        {
            "guidance_scale": SCALE - 1,
            "adaptive_projected_guidance_rescale": 3.0,
            "eta": 0.25,
            "use_original_formulation": True,
        },
    ),
    "MAMBO-G": ("MagnitudeAwareGuidance", {"guidance_scale": SCALE, "alpha": 2.0}),
    "CFG-Zero*": (
        "ClassifierFreeZeroStarGuidance",
        {"guidance_scale": SCALE, "guidance_rescale": 0.3, "zero_init_steps": 0},
    ),
}


def predictions():
    """A conditional and an unconditional prediction, (3, 4, 4, 2) each."""
    rng = np.random.default_rng(11)
    d_c = rng.standard_normal((3, 4, 4, 2)) + 0.3
    return d_c, 0.6 * d_c + 0.2 * rng.standard_normal(d_c.shape)


def guiders():
    import torch
    from diffusers import guiders

    # In one axis: MagnitudeAwareGuidance of diffusers 0.42.1 fails on events of three.
    d_c, d_u = (torch.from_numpy(d.reshape(3, 32)) for d in predictions())
    for name, (cls, options) in GUIDERS.items():
        guider = getattr(guiders, cls)(**options)
        guider.set_state(step=1, num_inference_steps=4, timestep=None)
        yield f"guider {name}", guider.forward(d_c, d_u).pred.numpy()


# --- Stochastic samplers -------------------------------------------------------------------------

STEPS = 6
ETAS = (1.0, 0.6)
SAMPLERS = {
    "sample_euler_ancestral": {"s_noise": 1.01},
    "sample_dpm_2_ancestral": {},
    "sample_dpmpp_2s_ancestral": {},
    "sample_dpmpp_sde": {},
    "sample_dpmpp_2m_sde": {},
    "sample_dpmpp_3m_sde": {},
}


def grid():
    """Karras from 5 to 0.05, then 0."""
    ends = 5.0 ** (1 / 7), 0.05 ** (1 / 7)
    return np.append(np.linspace(*ends, STEPS) ** 7, 0.0)


def problem():
    """Means (4, 2) of Gaussians of standard deviation 0.2, and a start (8, 2)."""
    rng = np.random.default_rng(12)
    return rng.standard_normal((4, 2)), 5 * rng.standard_normal((8, 2))


def noise(step):
    """Two draws for each step; (2, 8, 2)."""
    return np.random.default_rng(100 + step).standard_normal((2, 8, 2))


class BrownianPath:
    """A Brownian path in sigma as a noise sampler: a second, longer piece contains the first."""

    def __init__(self, sigmas):
        self.sigmas, self.begun = list(sigmas[:-1]), {}

    def __call__(self, sigma, sigma_next):
        import torch

        step = int(np.argmin(np.abs(np.array(self.sigmas) - float(sigma))))
        first, second = map(torch.from_numpy, noise(step))
        if step not in self.begun:
            self.begun[step] = sigma - sigma_next
            return first
        share = self.begun[step] / (sigma - sigma_next)
        return share**0.5 * first + (1 - share) ** 0.5 * second


def load_sampling(path):
    """k-diffusion's file by itself: what else it imports is for its adaptive solvers and trees."""
    package = types.ModuleType("k_diffusion")
    package.utils = types.ModuleType("k_diffusion.utils")
    package.utils.append_dims = lambda x, n: x[(...,) + (None,) * (n - x.ndim)]
    package.__path__ = []
    sys.modules |= {"k_diffusion": package, "k_diffusion.utils": package.utils}
    for name in ("torchdiffeq", "torchsde"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["torchdiffeq"].odeint = None
    spec = importlib.util.spec_from_file_location("k_diffusion.sampling", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def samplers(path):
    import torch

    sampling = load_sampling(path)
    means, x = map(torch.from_numpy, problem())
    sigmas = torch.from_numpy(grid())

    def denoiser(x, sigma):
        variance = 0.2**2 + sigma[:, None] ** 2
        logits = -(x[:, None] - means[None]).square().sum(-1) / (2 * variance)
        mean = logits.softmax(-1) @ means
        return mean + 0.2**2 / variance * (x - mean)

    for name, options in SAMPLERS.items():
        for eta in ETAS:
            noise_sampler = BrownianPath(grid())
            sample = getattr(sampling, name)
            found = sample(
                denoiser, x, sigmas, eta=eta, noise_sampler=noise_sampler, disable=True, **options
            )
            yield f"{name} {eta}", found.numpy()


def ddim():
    """States of diffusers' DDIM with eta = 0.6 on its own integer steps, (steps + 1, 8, 2)."""
    import torch
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        clip_sample=False, prediction_type="sample", timestep_spacing="leading"
    )
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    scheduler.set_timesteps(STEPS - 1)  # a step of 200, so that each ends where the next begins
    x = torch.from_numpy(noise(50)[0])
    states = [x.numpy()]
    for i, t in enumerate(scheduler.timesteps):
        draw = torch.from_numpy(noise(i)[0])
        x = scheduler.step(0.3 * torch.sin(x), t, x, eta=0.6, variance_noise=draw).prev_sample
        states.append(x.numpy())
    yield "ddim 0.6", np.stack(states)
    yield "ddim timesteps", scheduler.timesteps.numpy()
    yield "ddim alphas_cumprod", scheduler.alphas_cumprod.numpy()


# --- Schedulers ----------------------------------------------------------------------------------

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
DPM = "DPMSolverMultistepScheduler"
# Class, options, steps, and what set_timesteps is given beside.
SCHEDULERS = {
    "ddim": ("DDIMScheduler", {}, 7, {}),
    "ddim sd": ("DDIMScheduler", SD | {"set_alpha_to_one": False, "steps_offset": 1}, 10, {}),
    "ddim trailing": ("DDIMScheduler", {"timestep_spacing": "trailing"}, 8, {}),
    "ddpm linspace": ("DDPMScheduler", {"timestep_spacing": "linspace"}, 7, {}),
    "pndm": ("PNDMScheduler", SD | {"skip_prk_steps": True, "steps_offset": 1}, 10, {}),
    "euler": ("EulerDiscreteScheduler", SD, 7, {}),
    "euler leading": (
        "EulerDiscreteScheduler",
        SD | {"timestep_spacing": "leading", "steps_offset": 1, "final_sigmas_type": "sigma_min"},
        7,
        {},
    ),
    "euler karras": ("EulerDiscreteScheduler", SD | {"use_karras_sigmas": True}, 7, {}),
    "euler exponential": (
        "EulerDiscreteScheduler",
        SD | {"use_exponential_sigmas": True, "timestep_spacing": "trailing"},
        7,
        {},
    ),
    "euler ancestral": ("EulerAncestralDiscreteScheduler", SD, 7, {}),
    "heun": ("HeunDiscreteScheduler", SD | {"use_karras_sigmas": True}, 5, {}),
    "lms": ("LMSDiscreteScheduler", SD, 7, {}),
    "dpm": (DPM, SD, 7, {}),
    "dpm leading": (DPM, SD | {"timestep_spacing": "leading", "steps_offset": 1}, 7, {}),
    "dpm trailing": (DPM, SD | {"timestep_spacing": "trailing"}, 7, {}),
    "dpm karras": (DPM, SD | {"use_karras_sigmas": True}, 7, {}),
    "dpm lu": (DPM, SD | {"use_lu_lambdas": True}, 7, {}),
    "dpm clipped": (
        DPM,
        {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1},
        7,
        {},
    ),
    "dpm sigma_min": (DPM, SD | {"final_sigmas_type": "sigma_min"}, 7, {}),
    "dpm flow": (DPM, FLOW | {"flow_shift": 3.0}, 7, {}),
    "dpm flow dynamic": (DPM, FLOW | {"use_dynamic_shifting": True}, 7, {"mu": 0.9}),
    "dpm singlestep": ("DPMSolverSinglestepScheduler", SD, 6, {}),
    "unipc": ("UniPCMultistepScheduler", SD, 7, {}),
    "unipc exponential": ("UniPCMultistepScheduler", SD | {"use_exponential_sigmas": True}, 7, {}),
    "unipc flow": ("UniPCMultistepScheduler", FLOW | {"flow_shift": 5.0}, 7, {}),
    "deis": ("DEISMultistepScheduler", SD, 7, {}),
    "edm": ("EDMEulerScheduler", {"sigma_max": 40.0}, 7, {}),
    "edm dpm": ("EDMDPMSolverMultistepScheduler", {"sigma_schedule": "exponential"}, 7, {}),
    "flow": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, 7, {}),
    "flow dynamic": (
        "FlowMatchEulerDiscreteScheduler",
        {"shift": 3.0, "use_dynamic_shifting": True},
        7,
        {"mu": 0.8},
    ),
    "flow linear": (
        "FlowMatchEulerDiscreteScheduler",
        {"use_dynamic_shifting": True, "time_shift_type": "linear", "shift_terminal": 0.1},
        7,
        {"mu": 1.7},
    ),
    "flow given": (
        "FlowMatchEulerDiscreteScheduler",
        {"use_dynamic_shifting": True},
        4,
        {"mu": 0.8, "sigmas": [1.0, 0.75, 0.5, 0.25]},
    ),
    "flow karras": ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}, 7, {}),
}


def schedulers():
    """Configurations as saved, and the grid: ratios in VP and EDM, their sigmas in flows."""
    import diffusers
    import torch

    for name, (cls, options, steps, given) in SCHEDULERS.items():
        scheduler = getattr(diffusers, cls)(**options)
        scheduler.set_timesteps(steps, **given)
        times = scheduler.timesteps.double()
        if cls.startswith(("DDIM", "DDPM", "PNDM")):
            times = times.unique().flip(0)  # PNDM repeats one
            # In float32 theirs lose four digits of 1 - alphas_cumprod at the first beta.
            cumprod = (1 - scheduler.betas.double()).cumprod(0)
            last = getattr(scheduler, "final_alpha_cumprod", torch.ones(()))
            last = last.double() if last == 1 else cumprod[0]
            alphas = torch.cat([cumprod[times.long()], last[None]])
            sigmas = (1 / alphas - 1).sqrt()
        else:
            sigmas = scheduler.sigmas.double().unique().flip(0)  # Heun's are repeated
        yield f"scheduler {name}/config", np.array(scheduler.to_json_string())
        yield f"scheduler {name}/sigmas", sigmas.numpy()
        yield f"scheduler {name}/times", times.unique().flip(0).numpy()


def main():
    arrays = dict([*guiders(), *samplers(sys.argv[1]), *ddim(), *schedulers()])
    for name, array in arrays.items():
        print(name, np.shape(array), np.isfinite(array).all() if array.dtype.kind == "f" else "")
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    main()
