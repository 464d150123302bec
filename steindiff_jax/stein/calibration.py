"""A table of coefficients: record gamma once, replay it as constants.

A live correction computes gamma from the batch in every step. Where solver, grid and model stay
the same gamma hardly changes from batch to batch, so one run may stand for all: `calibrate` makes
the table, `Calibrated` replays x_next = anchor + gamma_k (candidate - anchor) without statistics,
derivatives or communication. `benchmarks/calibration.py` measures how far a table carries.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Float

from steindiff_jax._typing import (
    Batch,
    Denoiser,
    Key,
    Numeric,
    Scalar,
    Sigmas,
    Solver,
    State,
    Step,
    pytree,
    static,
)
from steindiff_jax.denoisers import rows
from steindiff_jax.grids import check_sigmas
from steindiff_jax.sample import sample
from steindiff_jax.stein.correction import Stein
from steindiff_jax.stein.divergence import Tweedie
from steindiff_jax.stein.rules import Local, Moments, Rule

_FORMAT = "steindiff_jax coefficients 1"
_RTOL = 1e-5  # two sigmas are one and the same but for the rounding of float32


@pytree
class Constant:
    """A rule's anchor with a coefficient that is known already: a number or one per sample."""

    rule: Rule
    value: Numeric
    gamma_min: Numeric = -jnp.inf
    gamma_max: Numeric = jnp.inf

    def anchor(self, local: Local) -> Batch:
        return self.rule.anchor(local)

    def moments(self, local: Local) -> Moments:
        return (jnp.zeros(local.x.shape[:1], local.x.dtype),)

    def gamma(self, moments: Moments, sigma: Scalar, sigma_next: Scalar) -> Array:
        del sigma, sigma_next
        return jnp.broadcast_to(self.value, jnp.shape(moments[0])).astype(moments[0].dtype)


def freeze(stein: Stein, gamma: Numeric) -> Stein:
    """The same correction with gamma, () or (batch,), held constant: no statistics, no probes."""
    statistics = "sample" if jnp.ndim(gamma) else "batch"
    rule = Constant(stein.rule, gamma)
    # Tweedie evaluates the denoiser and nothing else; what it says of the Jacobian is not used.
    return dataclasses.replace(stein, rule=rule, divergence=Tweedie(), statistics=statistics)


@pytree
class Calibrated:
    """A Stein-corrected solver whose coefficients are a table; made by `calibrate` or `load`.

    It steps along its own grid only (`table.sigmas`), padding zeros allowed. Another one is a
    ValueError, in `sample` or in `init`, if its length or, where they are known, its values are
    wrong. Inside your own `jit` values are not known: there a step that is not in the table gets
    gamma = NaN, and the samples are NaN and marked in info.finite, rather than wrong.

    Attributes:
      stein: the corrected solver that was recorded.
      sigmas: (steps + 1,) its grid.
      gamma: (steps,) the coefficients.
      fingerprint: SHA-256 of the denoiser it was recorded with.
    """

    stein: Stein
    sigmas: Sigmas
    gamma: Float[Array, " steps"]
    fingerprint: str = static(default="")

    def init(self, x: Batch, sigmas: Sigmas) -> State:
        self.check(sigmas)
        return self.stein.init(x, sigmas)

    def check(self, sigmas: ArrayLike) -> None:
        """ValueError unless `sigmas` is the grid of the table, as far as it is known by value."""
        if isinstance(sigmas, Tracer) or isinstance(self.sigmas, Tracer):
            other = jnp.shape(sigmas)[0] < self.sigmas.shape[0]  # more of them may be padding
        else:
            mine, given = (np.trim_zeros(np.asarray(grid), "b") for grid in (self.sigmas, sigmas))
            other = mine.shape != given.shape or not np.allclose(mine, given, rtol=_RTOL, atol=0)
        if other:
            raise ValueError(
                f"this table of gamma is for sigmas={_show(self.sigmas)}, got {_show(sigmas)}; "
                "pass sigmas=table.sigmas, or calibrate again"
            )

    def step(
        self, key: Key, denoiser: Denoiser, state: State, sigma: Scalar, sigma_next: Scalar
    ) -> tuple[State, Step]:
        here = _close(self.sigmas[:-1], sigma) & _close(self.sigmas[1:], sigma_next)
        gamma = jnp.where(here.any(), jnp.where(here, self.gamma, 0.0).sum(), jnp.nan)
        return freeze(self.stein, gamma).step(key, denoiser, state, sigma, sigma_next)

    def save(self, path: str | os.PathLike) -> None:
        """Write the table as JSON: a few numbers, the solver in words and the fingerprint."""
        table = {
            "format": _FORMAT,
            "solver": describe(self.stein),
            "fingerprint": self.fingerprint,
            "dtype": str(self.gamma.dtype),
            "sigmas": np.asarray(self.sigmas, np.float64).tolist(),
            "gamma": np.asarray(self.gamma, np.float64).tolist(),
        }
        Path(path).write_text(json.dumps(table, indent=2) + "\n")

    @classmethod
    def load(
        cls, path: str | os.PathLike, solver: Stein, denoiser: Denoiser | None = None
    ) -> "Calibrated":
        """Read a table back.

        Args:
          path: what `save` wrote.
          solver: the `Stein` that it was recorded with; compared by its numbers and names.
          denoiser: if given, compared by fingerprint. Leave it out to try a table on another
            model on purpose.

        Raises:
          ValueError: not such a file or a damaged one, another solver, another denoiser.
        """
        try:
            table = json.loads(Path(path).read_bytes())
            form = table["format"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is not a table that Calibrated.save wrote") from error
        if form != _FORMAT:
            raise ValueError(f"{path} has format {form!r}, expected {_FORMAT!r}")
        kinds = {"solver": str, "fingerprint": str, "dtype": str, "sigmas": list, "gamma": list}
        wrong = [name for name, kind in kinds.items() if not isinstance(table.get(name), kind)]
        if wrong:
            raise ValueError(f"{path} is damaged: {wrong[0]!r} is {table.get(wrong[0])!r}")
        if table["solver"] != describe(solver):
            raise ValueError(
                f"{path} was recorded with\n  {table['solver']}\ngot\n  {describe(solver)}\n"
                "pass that solver, or calibrate again"
            )
        if denoiser is not None and table["fingerprint"] != fingerprint(denoiser):
            raise ValueError(
                f"{path} was recorded with another denoiser: fingerprint {table['fingerprint']}, "
                f"got {fingerprint(denoiser)}; calibrate again, or leave the denoiser out"
            )
        try:
            sigmas, gamma = (_numbers(table[k], table["dtype"]) for k in ("sigmas", "gamma"))
            check_sigmas(sigmas)
            if sigmas.size != gamma.size + 1:
                raise ValueError(f"{gamma.size} coefficients for {sigmas.size} sigmas")
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        return cls(solver, sigmas, gamma, table["fingerprint"])


def calibrate(
    key: Key,
    denoiser: Denoiser,
    shape: tuple[int, ...] | None,
    sigmas: ArrayLike,
    solver: Solver,
    *,
    x_init: ArrayLike | None = None,
) -> Calibrated:
    """Run the correction once and keep its coefficients; not inside `jit`.

    Args:
      key: as in `sample`.
      denoiser: as in `sample`.
      shape: (batch, *event) as in `sample`; a large batch makes a quiet table.
      sigmas: (steps + 1,) as in `sample`.
      solver: a `Stein` with statistics="batch".
      x_init: as in `sample`.

    Returns:
      A solver that replays gamma. On the batch it was recorded from, gamma is the live run's.

    Raises:
      ValueError: another kind of solver; per-sample statistics, whose gamma belongs to one sample
        and not to a step; a run that did not stay finite.
    """
    if not isinstance(solver, Stein):
        raise ValueError(f"solver must be a Stein, whose gamma there is to record, got {solver!r}")
    if solver.statistics != "batch":
        raise ValueError(
            "calibrate needs statistics='batch', one gamma for each step; gamma of statistics="
            f"{solver.statistics!r} belongs to single samples"
        )
    sigmas = check_sigmas(sigmas)
    solution = sample(key, denoiser, shape, sigmas=sigmas, solver=solver, x_init=x_init)
    if not (solution.info.finite.all() and jnp.isfinite(solution.info.gamma).all()):
        share = 1 - float(solution.info.finite.all(axis=0).mean())
        raise ValueError(f"{share:.0%} of the samples did not stay finite; gamma would be biased")
    gamma = solution.info.gamma
    return Calibrated(solver, sigmas.astype(gamma.dtype), gamma, fingerprint(denoiser))


def describe(solver: Any) -> str:
    """A solver in words: its classes, choices and numbers, equal for equal solvers."""
    return repr(jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), solver))


def fingerprint(denoiser: Denoiser) -> str:
    """SHA-256 of a denoiser's arrays and numbers (weights, guidance scale), without conditioning.

    Of what a plain function closes over nothing is known, only its name.
    """
    digest = hashlib.sha256()
    unconditioned = rows(denoiser, lambda row: row[:0])
    for path, leaf in jax.tree_util.tree_leaves_with_path(unconditioned):
        digest.update(jax.tree_util.keystr(path).encode())
        if isinstance(leaf, jax.typing.ArrayLike):
            value = np.asarray(leaf)
            digest.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
        else:
            digest.update(getattr(leaf, "__qualname__", type(leaf).__qualname__).encode())
    return digest.hexdigest()


def _numbers(values: list, dtype: str) -> Array:
    """A list of JSON as an array, or a ValueError unless it is one of finite numbers."""
    largest = float(np.finfo(dtype).max) if dtype in ("float32", "float64") else -1.0
    for value in values:
        if type(value) not in (int, float) or not abs(value) <= largest:
            raise ValueError(f"{value!r} is no finite number in {dtype!r}")
    return jnp.asarray(np.asarray(values, dtype))


def _close(a: Array, b: Array) -> Array:
    return jnp.abs(a - b) <= _RTOL * jnp.abs(b)


def _show(sigmas: ArrayLike) -> str:
    if isinstance(sigmas, Tracer):
        return f"{sigmas.size} values that are traced"
    return f"[{', '.join(f'{sigma:.5g}' for sigma in np.asarray(sigmas))}]"
