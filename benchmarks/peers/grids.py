"""The grids that samplers are run on, from sigma = 80 to 0.002, and most of them to 0."""

from functools import cache

import jax.numpy as jnp
import numpy as np

import steindiff_jax as sd
import sweep

ENDS = 80.0, 0.002
# Timesteps of Stable Diffusion for ten steps, in Align Your Steps' quick start (Sabour et al. 2024,
# arXiv:2404.14507): https://research.nvidia.com/labs/toronto-ai/AlignYourSteps/howto.html.
ALIGN_YOUR_STEPS = {
    "AYS SD1.5": (999, 850, 736, 645, 545, 455, 343, 233, 124, 24, 0),
    "AYS SDXL": (999, 845, 730, 587, 443, 310, 193, 116, 53, 13, 0),
}


@cache
def common(steps: int) -> dict[str, np.ndarray]:
    """Name -> sigmas (steps + 1,), which end in 0."""
    return {name: np.asarray(make(steps), np.float64) for name, make in sweep.GRIDS.items()}


@cache
def above_zero(steps: int) -> dict[str, np.ndarray]:
    """The same with all steps between the ends."""
    return {name: np.asarray(make(steps), np.float64) for name, make in sweep.ABOVE_ZERO.items()}


@cache
def published(steps: int) -> dict[str, np.ndarray]:
    """DDPM's integer steps, which diffusers takes by default, and Align Your Steps.

    The latter interpolated in log sigma for other than ten steps, as its page says, and rescaled
    in log sigma to the same ends as all others; its last level is replaced by 0.
    """
    ddpm = sd.ddpm_sigmas(steps, sd.Discrete.linear(), "linspace")
    found = {"DDPM": np.asarray(ddpm, np.float64)}
    for name, timesteps in ALIGN_YOUR_STEPS.items():
        sigmas = sd.Discrete.scaled_linear().ratio(jnp.asarray(timesteps, float))
        logs = np.log(sweep.interpolated(np.asarray(sigmas), steps + 1))
        share = (logs - logs[-1]) / (logs[0] - logs[-1])
        found[name] = np.append(ENDS[1] * (ENDS[0] / ENDS[1]) ** share[:-1], 0.0)
    return found


def of(peer, steps: int, gits=None) -> dict[str, np.ndarray]:
    """Those that a peer can step through, its own among them; gits: steps -> sigmas."""
    own = {} if peer.own_grid is None else {"own": peer.own_grid(steps)}
    if peer.only_own:
        return own
    if not peer.to_zero:
        return dict(zip(sweep.GRIDS, above_zero(steps).values(), strict=True)) | own
    found = common(steps) | own
    if peer.every_grid:
        found |= above_zero(steps) | published(steps) | ({"GITS": gits(steps)} if gits else {})
    return found
