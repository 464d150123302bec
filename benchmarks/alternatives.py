"""What was tried in place of the default rule's parts, one at a time (an hour on two cores).

Corrected / plain in `both` distances, as in quality.py, on the half that rules are developed on,
over both grids, steps 4, 6 and 10 and two seeds: read differences of a few percent as none. Columns
are means over vectors, images of at most 64 numbers, larger ones and the network, once for DDIM and
once for the other solvers; the last ones are the worst single cell and the band energy. A cell is
empty where a variant was not run or changes nothing.
"""

from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import metrics
import problems
import steindiff_jax as sd
import sweep
from steindiff_jax.stein.rules import Gamma, Lengths, gaussian, jacobian

SMALL = 64  # numbers of a sample
SOLVERS = ("DDIM", "2M", "iPNDM-3")
PROBLEMS = (
    "clumps",
    "curve",
    "anisotropic",
    "offset",
    "spectrum k^-2, 8x8x1",
    "grey patches 6x6",
    "spectrum k^-2.5, 12x12x3",
    "colour patches 8x8",
    "digits network, guidance 3",
)


# --- Bases ---------------------------------------------------------------------------------------


@sd.pytree
class Pixels(sd.Basis):
    """No transform, and each pixel a band, with all its channels."""

    def labels(self, event):
        pixels = np.arange(np.prod(event[:-1])).reshape(*event[:-1], 1)
        return np.broadcast_to(pixels, event)


@sd.pytree
class Coefficients(sd.Cosine):
    """Each coefficient of the cosine transform a band."""

    def labels(self, event):
        return np.arange(np.prod(event)).reshape(event)


@sd.pytree
class Haar(sd.Cosine):
    """Haar wavelets along each axis in place of cosines, a band for each octave; colour as there.

    A side is halved as long as it is even.
    """

    def labels(self, event):
        *space, channels = event
        octaves = np.meshgrid(*(haar(size)[1] for size in space), indexing="ij")
        labels = np.max(octaves, axis=0)[..., None] + 100 * (np.arange(channels) > 0)
        return np.unique(labels, return_inverse=True)[1].reshape(event)

    def transform(self, x):
        x = along_axes(x, [haar(size)[0] for size in x.shape[1:-1]])
        return sd.Cosine().transform(x.reshape(-1, x.shape[-1])).reshape(x.shape)

    def inverse(self, coefficients):
        c = coefficients
        c = sd.Cosine().inverse(c.reshape(-1, c.shape[-1])).reshape(c.shape)
        return along_axes(c, [haar(size)[0].T for size in c.shape[1:-1]])


def along_axes(x, matrices):
    for axis, matrix in enumerate(matrices, start=1):
        x = jnp.moveaxis(jnp.tensordot(x, jnp.asarray(matrix, x.dtype), (axis, 1)), -1, axis)
    return x


def haar(size):
    """The orthonormal matrix (coefficient, place), and the octave of each coefficient."""
    if size % 2:
        return np.eye(size), np.zeros(size, int)
    matrix, octave = haar(size // 2)
    sums, differences = (np.kron(np.eye(size // 2), [[1, s]]) / np.sqrt(2) for s in (1, -1))
    finest = np.full(size // 2, octave.max() + 1)
    return np.concatenate([matrix @ sums, differences]), np.concatenate([octave, finest])


# --- Rules ---------------------------------------------------------------------------------------


@sd.pytree
class LowOnly(sd.PosteriorLength):
    """Of two bands the one of high frequencies is left as the solver has it."""

    def coefficients(self, moments, sizes, sigma, sigma_next):
        gamma, drift = super().coefficients(moments, sizes, sigma, sigma_next)
        return Lengths(gamma.at[..., -1].set(1.0), drift.at[..., -1].set(0.0))


@sd.pytree
class NoGauss(sd.PosteriorLength):
    """gamma as it is, without the Gaussian step."""

    def coefficients(self, *arguments):
        return super().coefficients(*arguments)._replace(drift=jnp.zeros(()))


ADDITIVE = sd.PosteriorLength(gamma_max=1.0)  # for a delta too short, the Gaussian step alone


@sd.pytree
class LengthOnly(sd.PosteriorLength):
    """gamma = g throughout: the solver's own direction alone.

    g is read off `ADDITIVE`, whose drift is (1 - 1/g) eta where g > 1.
    """

    def coefficients(self, moments, sizes, sigma, sigma_next):
        eta = gaussian(jacobian(moments, sizes, sigma).mean, sigma_next / sigma)
        gamma, drift = ADDITIVE.coefficients(moments, sizes, sigma, sigma_next)
        longer = 1 - drift / jnp.where(eta < 0, eta, -1.0)
        gamma = jnp.minimum(gamma / jnp.maximum(longer, 1e-6), self.gamma_max)
        return Lengths(gamma, jnp.zeros_like(gamma))


@sd.pytree
class NoGate(sd.PosteriorLength):
    """In full, however right the solver's last delta was."""

    def moments(self, local):
        moments = super().moments(local)
        return moments._replace(confirmed=0 * moments.confirmed)


@sd.pytree
class OnTheLaw(sd.PosteriorLength):
    """The solver's delta where |x - D|^2 > sigma^2 d, which no noised data have on average."""

    def coefficients(self, moments, sizes, sigma, sigma_next):
        gamma, drift = super().coefficients(moments, sizes, sigma, sigma_next)
        off = (moments.noise > sizes) & (moments.delta > 0)
        return Lengths(jnp.where(off, 1.0, gamma), jnp.where(off, 0.0, drift))


@sd.pytree
class Residual(sd.PosteriorLength):
    """tr J = d - |x - D|^2 / sigma^2, Stein's identity for D itself, without the regression."""

    def moments(self, local):
        noise = (local.x - local.x0) / local.sigma
        trace = local.sizes - local.inner(noise, noise)
        return super().moments(local._replace(trace=lambda: trace))


@sd.pytree
class Slope(sd.PosteriorLength):
    """tr J / d = a, the slope of D on x, as if all data were Gaussian."""

    def coefficients(self, moments, sizes, sigma, sigma_next):
        together = moments.signal + sigma * moments.cross
        energy = together + sigma * (moments.cross + sigma * moments.noise)
        moments = moments._replace(trace=sizes * together / energy)
        return super().coefficients(moments, sizes, sigma, sigma_next)


@sd.pytree
class NoiseNorm(sd.Rule):
    """aDDIM (Heek et al. 2024, arXiv:2403.06807): DDIM whose noise has the norm it should.

    x_next = D + sqrt(sigma_next^2 + (1 - q)^2 V d / |e|^2) e, with e = (x - D) / sigma; V, a
    constant there, is here the posterior variance sigma^2 (1 - |e|^2 / d), by Stein's identity.
    """

    def moments(self, local):
        noise = (local.x - local.x0) / local.sigma
        return local.inner(noise, noise)

    def coefficients(self, moments, sizes, sigma, sigma_next):
        q, share = sigma_next / sigma, moments / sizes
        variance = jnp.maximum(1 - share, 0)
        norm = jnp.sqrt(q**2 + (1 - q) ** 2 * variance / share)
        return Gamma(jnp.where(sigma_next > 0, (norm - q) / (1 - q), 0.0))

    def delta(self, local, coefficients):
        return coefficients.gamma * (local.x - local.x0)


# --- The table -----------------------------------------------------------------------------------


def variants(problem: problems.Problem) -> dict:
    """Name -> solver -> corrected solver, of those that make sense on this problem."""
    exact = isinstance(problem.denoiser, problems.Mixture | problems.Waves)
    chosen = {"as it is": sd.Stein, "one band": partial(sd.Stein, basis=sd.Whole())}
    if len(problem.event) > 1:
        low = {"rule": LowOnly(), "basis": sd.Cosine(2, colour=False)}
        chosen |= {
            "upper octave left alone": partial(sd.Stein, **low),
            "pixels": partial(sd.Stein, basis=Pixels()),
            "Haar": partial(sd.Stein, basis=Haar()),
            "cosine, no colour": partial(sd.Stein, basis=sd.Cosine(5, colour=False)),
            "cosine, two bands": partial(sd.Stein, basis=sd.Cosine(2, colour=False)),
            "every coefficient": partial(sd.Stein, basis=Coefficients()),
        }
    rules = {
        "no Gaussian step": NoGauss(),
        "length only": LengthOnly(),
        "Gaussian step only": ADDITIVE,
        "no surprise gate": NoGate(),
        "where the identity can hold": OnTheLaw(),
        "trace: plain residual": Residual(),
        "trace: slope only": Slope(),
    }
    chosen |= {name: partial(sd.Stein, rule=rule) for name, rule in rules.items()}
    chosen["trace: one probe"] = partial(sd.Stein, estimator=sd.Hutchinson())
    if exact and np.prod(problem.event) <= SMALL:
        chosen["trace: exact"] = partial(sd.Stein, estimator=sd.Exact())
    whole = {"basis": sd.Whole()}
    chosen |= {
        "StepEnergy": partial(sd.Stein, rule=sd.StepEnergy()),
        "StepEnergy, one band": partial(sd.Stein, rule=sd.StepEnergy(), **whole),
        "aDDIM": partial(only_first_order, rule=NoiseNorm(), **whole),
        "aDDIM in bands": partial(only_first_order, rule=NoiseNorm()),
    }
    return {"plain": sweep.plain} | chosen


def only_first_order(solver, **parts):
    return sd.Stein(solver, **parts) if isinstance(solver, sd.DDIM) else solver


def main() -> None:
    output = Path(__file__).parent / "results" / "alternatives.json"
    parser = sweep.options(__doc__, "tune", SOLVERS, PROBLEMS, seeds=2, n=200, steps=(4, 6, 10))
    parser.add_argument("--output", type=Path, default=output)
    parser.add_argument("--read", type=Path, nargs="*", help="results of earlier runs")
    arguments = parser.parse_args()
    if arguments.read is None:
        runs = sweep.sweep_all("tune", arguments, variants)
    else:
        runs = {run: d for path in arguments.read for run, d in sweep.read(path).items()}
    sweep.write(runs, arguments.output)
    results = sweep.Results(runs)
    groups = {}
    small = {run.problem for run in runs if run.correction == "trace: exact"}
    for name in results.problems:
        kind = problems.kind(name)
        kind = "small images" if kind == "images" and name in small else kind
        groups.setdefault(kind, []).append(name)
    solvers = {"DDIM": ["DDIM"], "others": [s for s in results.solvers if s != "DDIM"]}
    rows = []
    for variant in results.corrections[1:]:
        row = [
            results.ratio("both", variant, problem=names, solver=chosen)[0]
            for names in groups.values()
            for chosen in solvers.values()
        ]
        row += [results.cells("both", variant)[0][0], results.ratio("energy", variant)[0]]
        rows.append([variant, *("" if np.isnan(r) or r == 1 else f"{r:.2f}" for r in row)])
    header = [f"{g}, {s}" for g in groups for s in solvers]
    print(metrics.table(["variant", *header, "worst cell", "band energy"], rows))


if __name__ == "__main__":
    main()
