"""A table of coefficients: record them once, replay them as constants.

A live correction computes its coefficients from the batch in every step. Where solver, grid and
model stay the same they hardly change from batch to batch, so one run may stand for all:
`calibrate` makes the table, `Calibrated` replays it without statistics, derivatives or
communication. `benchmarks/calibration.py` measures how far a table carries.
"""

import dataclasses
import json
import os
from collections import namedtuple
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from steindiff_jax import _checks
from steindiff_jax._identity import describe, fingerprint
from steindiff_jax._pytree import pytree, static
from steindiff_jax.grids import check_sigmas, unpadded
from steindiff_jax.protocols import (
    Batch,
    Denoiser,
    Key,
    Scalar,
    Sigmas,
    State,
    Step,
    Wrapper,
)
from steindiff_jax.sample import sample
from steindiff_jax.stein import Cosine, Stein, Whole
from steindiff_jax.stein.correction import Memory
from steindiff_jax.stein.rules import Gamma, Lengths

_RTOL = 1e-5  # two sigmas are one and the same but for the rounding of float32


@pytree
class Calibrated(Wrapper):
    """A Stein-corrected solver whose coefficients are a table; made by `calibrate` or `load`.

    It steps along its own grid only (`table.sigmas`), padding allowed. Another one is a
    ValueError, in `sample` or in `init`, if its length or, where they are known, its values are
    wrong. Inside your own `jit` values are not known: there a step that is not in the table gets
    gamma = NaN, and the samples are NaN and marked in info.finite, rather than wrong.

    Attributes:
      inner: the `Stein` that was recorded, with the basis that it used.
      sigmas: (steps + 1,) its grid.
      coefficients: its rule's coefficients, (steps, bands) each.
      fingerprint: SHA-256 of the denoiser it was recorded with.
    """

    inner: Stein  # pyright: ignore[reportIncompatibleVariableOverride]
    sigmas: Sigmas
    coefficients: Any
    fingerprint: str = static(default="")

    _format: ClassVar[str] = "steindiff_jax coefficients 2"
    _more: ClassVar[dict[str, int]] = {}  # further arrays with a row for each step, and their axes

    @property
    def gamma(self) -> Array:
        """The first of the coefficients, (steps, bands), without bands if there is one."""
        gamma = self.coefficients[0]
        return gamma[:, 0] if gamma.shape[-1] == 1 else gamma

    def init(self, x: Batch, sigmas: Sigmas) -> Memory:
        self.check(sigmas)
        return self.inner.init(x, sigmas)

    def check(self, sigmas: ArrayLike) -> None:
        """ValueError unless `sigmas` is the grid of the table, as far as it is known by value."""
        if isinstance(sigmas, Tracer) or isinstance(self.sigmas, Tracer):
            other = jnp.shape(sigmas)[0] < self.sigmas.shape[0]  # more of them may be padding
        else:
            mine, given = (unpadded(grid) for grid in (self.sigmas, sigmas))
            other = mine.shape != given.shape or not np.allclose(mine, given, rtol=_RTOL, atol=0)
        if other:
            raise ValueError(
                f"this table is for sigmas={_show(self.sigmas)}, got {_show(sigmas)}; "
                "pass sigmas=table.sigmas, or calibrate again"
            )

    def step(
        self,
        key: Key,
        denoiser: Denoiser,
        state: State,
        sigma: Scalar,
        sigma_next: Scalar,
        *,
        x0: Batch | None = None,
    ) -> tuple[Step, Memory]:
        coefficients = self.at(sigma, sigma_next, self.coefficients)
        return self.inner.replay(coefficients, key, denoiser, state, sigma, sigma_next, x0=x0)

    def at(self, sigma: Scalar, sigma_next: Scalar, columns: Any) -> Any:
        """One step's rows of a pytree of (steps, ...) arrays; NaN if it is not in the table."""
        here = _close(self.sigmas[:-1], sigma) & _close(self.sigmas[1:], sigma_next)

        def row(column: Array) -> Array:
            chosen = jnp.where(here.reshape(-1, *[1] * (column.ndim - 1)), column, 0.0)
            return jnp.where(here.any(), chosen.sum(0), jnp.nan)

        return jax.tree.map(row, columns)

    def save(self, path: str | os.PathLike) -> None:
        """Write the table as JSON: a few numbers, the solver in words and the fingerprint."""
        table = {
            "format": self._format,
            "solver": describe(self.inner),
            "basis": _options(self.inner.basis),
            "fingerprint": self.fingerprint,
            "dtype": str(self.sigmas.dtype),
            "sigmas": np.asarray(self.sigmas, np.float64).tolist(),
            "coefficients": {
                name: np.asarray(column, np.float64).tolist()
                for name, column in self.coefficients._asdict().items()
            },
        }
        table |= {name: np.asarray(getattr(self, name), float).tolist() for name in self._more}
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
        if form != cls._format:
            raise ValueError(f"{path} has format {form!r}, expected {cls._format!r}")
        kinds = {
            "solver": str,
            "basis": list,
            "fingerprint": str,
            "dtype": str,
            "sigmas": list,
            "coefficients": dict,
        } | dict.fromkeys(cls._more, list)
        wrong = [name for name, kind in kinds.items() if not isinstance(table.get(name), kind)]
        if wrong:
            raise ValueError(f"{path} is damaged: {wrong[0]!r} is {table.get(wrong[0])!r}")
        if solver.basis is None and table["basis"]:
            name, *options = table["basis"]
            try:
                solver = dataclasses.replace(solver, basis=BASES[name](*options))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path} is damaged: 'basis' is {table['basis']!r}") from error
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
            sigmas = _numbers(table["sigmas"], table["dtype"])
            check_sigmas(sigmas)
            names, columns = zip(*table["coefficients"].items(), strict=True)
            columns = [_numbers(column, table["dtype"]) for column in columns]
            shapes = {column.shape for column in columns}
            if len(shapes) != 1 or {(sigmas.size - 1, *shape[1:2]) for shape in shapes} != shapes:
                raise ValueError(f"coefficients of shapes {shapes} for {sigmas.size} sigmas")
            more = {name: _numbers(table[name], table["dtype"]) for name in cls._more}
            for name, value in more.items():
                if value.ndim != cls._more[name] or len(value) != sigmas.size - 1:
                    raise ValueError(f"{name} of shape {value.shape} for {sigmas.size} sigmas")
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        return cls(solver, sigmas, _kind(names)(*columns), table["fingerprint"], **more)


@cache
def _kind(names: tuple[str, ...]) -> type:
    """The NamedTuple of these coefficients; always the same, for another would compile again."""
    known = {kind._fields: kind for kind in (Gamma, Lengths)}
    return known.get(names) or namedtuple("Coefficients", names)


def calibrate(
    key: Key,
    denoiser: Denoiser,
    shape: tuple[int, ...] | None,
    sigmas: ArrayLike,
    solver: Stein,
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
      A solver that replays them. On the batch they were recorded from, they are the live run's.

    Raises:
      ValueError: another kind of solver; per-sample statistics, whose gamma belongs to one sample
        and not to a step; a run that did not stay finite.
    """
    _checks.instance("solver", solver, Stein, "a Stein, whose coefficients there are to record")
    if solver.statistics != "batch":
        raise ValueError(
            "calibrate needs statistics='batch', one gamma for each step; gamma of statistics="
            f"{solver.statistics!r} belongs to single samples"
        )
    sigmas = check_sigmas(sigmas)
    batch = tuple(shape or jnp.shape(jnp.asarray(x_init)))
    solver = dataclasses.replace(solver, basis=solver.basis_of(batch))
    solution = sample(
        key,
        denoiser,
        shape,
        sigmas=sigmas,
        solver=solver,
        x_init=x_init,
        record=_coefficients,
    )
    finite = jax.tree.map(lambda column: jnp.isfinite(column).all(), solution.record)
    if not (solution.info.finite.all() and all(finite)):
        share = 1 - float(solution.info.finite.all(axis=0).mean())
        raise ValueError(f"{share:.0%} of the samples did not stay finite; gamma would be biased")
    sigmas = sigmas.astype(solution.x.dtype)
    return Calibrated(solver, sigmas, solution.record, fingerprint(denoiser))


def _coefficients(state: State, step: Step) -> Any:
    del state
    return step.coefficients


BASES = {"Cosine": Cosine, "Whole": Whole}


def _options(basis: Any) -> list:
    """A basis of the library as a list to make it again from; nothing of any other."""
    name = type(basis).__name__
    if BASES.get(name) is not type(basis):
        return []
    return [name, *(getattr(basis, field.name) for field in dataclasses.fields(basis))]


def _numbers(values: list, dtype: str) -> Array:
    """A list of JSON as an array, or a ValueError unless it is one of finite numbers."""
    largest = float(np.finfo(dtype).max) if dtype in ("float32", "float64") else -1.0
    for value in _flat(values):
        if type(value) not in (int, float) or not abs(value) <= largest:
            raise ValueError(f"{value!r} is not a finite number in {dtype!r}")
    return jnp.asarray(np.asarray(values, dtype))


def _flat(values: list) -> Iterator:
    for value in values:
        yield from _flat(value) if isinstance(value, list) else (value,)


def _close(a: Array, b: Array) -> Array:
    return jnp.abs(a - b) <= _RTOL * jnp.abs(b)


def _show(sigmas: ArrayLike) -> str:
    if isinstance(sigmas, Tracer):
        return f"{sigmas.size} values that are traced"
    return f"[{', '.join(f'{sigma:.5g}' for sigma in np.asarray(sigmas))}]"
