"""report.md of two screens, full.md and quality.png, from what was run."""

import json
from collections import defaultdict
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import metrics
import problems
import sweep
from peers import compare, grids
from peers.compare import Row

Case = tuple[str, float, int]  # problem, guidance, evaluations
Sampler = tuple[str, str]  # and its grid
FAMILIES = (
    "images",
    "images, guided",
    "networks",
    "networks, guided",
    "vectors",
    "vectors, guided",
)
OURS: list[Sampler] = [("default (ours)", "Karras to 0.002")]  # as the README has it
# What each library does, or its documentation or paper, where nothing else is asked for.
THEIRS: list[Sampler] = [
    ("DPM++ 2M (diffusers)", "own"),
    ("UniPC-2 (diffusers)", "own"),
    ("DPM++ 2M (diffusers Flax 0.39)", "own"),
    ("DPM++ 2M (k-diffusion's formulas)", "Karras"),
    ("Heun (k-diffusion's formulas)", "Karras"),
    ("iPNDM-4 (diff-sampler's formulas)", "own"),
    ("AB-3 (azula)", "own"),
    ("DDIM (dewml)", "Karras"),
    ("DDIM (diffuse-jax)", "own"),
    ("DDIM (hackable-diffusion)", "own"),
    ("DPM++ 2M (MaxDiffusion)", "own"),
    ("UniPC-2 (MaxDiffusion)", "own"),
    ("DPM-Solver-v3 (authors' formulas)", "log-SNR"),
    ("aDDIM (paper's formulas)", "log-SNR"),
]
NOT_RUN = (
    "Not run: a library that the versions above do not name, of which dewml, diffuse-jax and "
    "hackable-diffusion need Python 3.12 and MaxDiffusion a checkout; dewml's RK4 and PNDM, of "
    "four evaluations in every step or in the first three, and its KDPM2, k-diffusion's DPM-2; "
    "diffuse-jax's EDM model, which cuts noise levels at 0.999; its Euler, hackable-diffusion's "
    "velocity step and MaxDiffusion's flow schedulers of order 1, which on a rectified flow are "
    "DDIM; MaxDiffusion's LMS and PNDM, which are those of older diffusers; solvers "
    "fitted to one network (see benchmarks/fitting.py)."
)

# Theirs that are also inside `Stein`.
SAME = {f"DPM++ {n}M": "k-diffusion's formulas" for n in (2, 3)}
SAME |= {f"iPNDM-{n}": "diff-sampler's formulas" for n in (2, 3, 4)}
FITTED = Path(__file__).parents[1] / "results" / "fitting.json"  # what benchmarks/fitting.py writes
FITS = ("GITS", "grid alone (LD3)", "rows alone (S4S)", "grid and rows (GS)")  # against "all"


def family(problem: str, guidance: float) -> str:
    return problems.kind(problem) + (", guided" if guidance > 1 else "")


MEASURES = {
    "both": lambda row: (row.pixels * row.bands) ** 0.5,
    "pixels": lambda row: row.pixels,
    "bands": lambda row: row.bands,
    "rmse": lambda row: row.rmse,
}


class Comparison:
    """Log distances, case by case: logs[case][side][sampler, grid][seed].

    The fine solve is a side of its own, the same at all evaluations. A distance that is not finite
    counts as `sweep.FAILED`.
    """

    def __init__(self, rows: Iterable[Row], measure: str = "both") -> None:
        self.logs = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
        self.rows, fine = {}, defaultdict(dict)
        for row in rows:
            case, sampler = (row.problem, row.guidance, row.evaluations), (row.sampler, row.grid)
            value = np.log(np.minimum(MEASURES[measure](row), sweep.FAILED))
            if row.side == "fine":
                fine[case[:2]][row.seed] = float(value)
                continue
            self.logs[case][row.side][sampler][row.seed] = float(value)
            self.rows[case, sampler] = row
        for case, sides in self.logs.items():
            sides["fine"][compare.FINE] = fine[case[:2]]

    def cases(self, name: str = "", evaluations: int = 0) -> list[Case]:
        """Those of a family that both sides have; without arguments all."""
        return [
            case
            for case, sides in self.logs.items()
            if {"ours", "peer"} <= set(sides)
            and name in ("", family(*case[:2]))
            and evaluations in (0, case[2])
        ]

    def samplers(self, side: str, cases: list[Case]) -> list[Sampler]:
        """All of a side, in one order whatever the hash seed: of two that tie the first is best."""
        return sorted({sampler for case in cases for sampler in self.logs[case][side]})

    def mean(self, side: str, sampler: Sampler, cases: list[Case]) -> float:
        """Infinite where a sampler was not run."""
        values = [self.logs[case][side].get(sampler) for case in cases]
        return float(np.mean([np.mean([*v.values()]) if v else np.inf for v in values]))

    def best(self, side: str, cases: list[Case], among: list[Sampler] | None = None):
        """One sampler and grid for all of these cases, by its mean over them and the seeds."""
        found = among or self.samplers(side, cases)
        return min(found, key=lambda sampler: self.mean(side, sampler, cases), default=None)

    def ratio(
        self, pairs: Iterable[tuple[Case, Sampler, Sampler]], side: str = "ours"
    ) -> tuple[float, float]:
        """Geometric mean of ours / theirs and the half-width of its interval over seeds.

        A seed with fewer of the cases than another is left out: its mean is of something else.
        """
        seeds = defaultdict(list)
        for case, ours, theirs in pairs:
            a, b = self.logs[case][side].get(ours, {}), self.logs[case]["peer"].get(theirs, {})
            for seed in a.keys() & b.keys():
                seeds[seed].append(a[seed] - b[seed])
        most = max(map(len, seeds.values()), default=0)
        return sweep.interval([float(np.mean(v)) for v in seeds.values() if len(v) == most])

    def against(self, kind: str, cases: list[Case]) -> tuple[float, float]:
        """The ratio of a row of the first table."""
        _, side, ours, theirs = KINDS[kind]
        two = self.best(side, cases, ours), self.best("peer", cases, theirs)
        return self.ratio(((c, *two) for c in cases), side)


# The name of a row; the side of the numerator; what it and the peers' are chosen among.
KINDS = {
    "default": ("default / best of their defaults", "ours", OURS, THEIRS),
    "best": ("default / best of theirs", "ours", OURS, None),
    "one": ("best / best", "ours", None, None),
    "fine": ("fine solve / best of theirs", "fine", [compare.FINE], None),
}


def write(output: Path) -> str:
    """report.md, which is returned, and what it links to, from the files that were run."""
    rows = compare.read(*sorted((output / "runs").glob("*.jsonl")))
    known = json.loads((output / "facts.json").read_text())
    records = [
        r for path in sorted(output.glob("speed*.json")) for r in json.loads(path.read_text())
    ]
    comparison = Comparison(rows)
    plot(comparison, output / "quality.png")
    parts = [
        "# Side by side",
        opening(known),
        "Problems: "
        + "; ".join(dict.fromkeys(row.problem for row in rows))
        + ". Not every library "
        "was run on all of them: [what was run](full.md#what-was-run).",
        "## Ours over theirs",
        "Ratios of distances, families and rows that are lost most first; above 1, in bold, a peer "
        "is nearer to the data. The best of a side is one sampler and grid for all problems of a "
        "family, chosen by the mean over the seeds that it is reported on, which favours the side "
        "with more samplers, the peers. What few steps can reach is the fine solve. Of theirs "
        "DPM-Solver-v3 takes statistics of the data first: "
        "[what it cost](full.md#what-tuning-took).",
        against(comparison),
        "## Where a peer wins",
        losses(comparison),
        "## Our default over each of theirs, images",
        defaults(comparison),
        "![Distance against evaluations](quality.png)",
        *([slower(records)] if records else []),
        *fitted(FITTED),
        NOT_RUN,
        "[Every sampler, what tuning took, and times](full.md).",
    ]
    text = "\n\n".join(parts) + "\n"
    (output / "report.md").write_text(text)
    full = [
        "# Side by side: every sampler",
        "## What was run",
        covered(rows),
        everything(comparison, rows),
        *(f"## By {m} alone\n\n{against(Comparison(rows, m))}" for m in list(MEASURES)[1:]),
        "## The same solver with the correction over without it, images",
        same(comparison),
        "## Every case that a peer wins",
        losses(comparison, limit=None),
        "## What tuning took",
        tuning(rows),
        "## Not finite",
        failed(rows),
        *(["## Time", times(records)] if records else []),
    ]
    (output / "full.md").write_text("\n\n".join(full) + "\n")
    return text


def opening(known: dict) -> str:
    sizes = known["sizes"]
    versions = ", ".join(f"{k} {v}" for k, v in known["versions"].items() if v)
    return (
        f"{known['date']}, {known['machine']}, Python {known['python']}; {versions}. Made by "
        "`python benchmarks/peers`.\n\n"
        "Every sampler starts from the same noise and calls the same denoiser, no more often than "
        "the evaluations say; how many steps these make is told beside them. Distances are the "
        "geometric mean of sliced-W2 in pixels and with each band scaled to unit variance (see "
        f"benchmarks/metrics.py), of {sizes['samples']} samples to the data, or under guidance to "
        "the fine solve, where every other component is the class asked for; of networks "
        f"{sizes['network_samples']}, to their own fine solve. Up to {sizes['seeds']} seeds, "
        "95% intervals; one seed where none stands. "
        "Grids: Karras and log-SNR from 80 to 0.002 and then 0 for all, each library's own, and "
        "for ours and for DPM++ and iPNDM of order 3 and more also these without the 0, DDPM's, "
        "GITS (our implementation) and the two published of Align Your Steps, rescaled in log "
        "sigma. Our default is on Karras' grid without the 0, as the README has it, chosen on "
        "problems that are not among these."
    )


def against(comparison: Comparison) -> str:
    """The first table, what is lost most first."""
    budgets = sorted({case[2] for case in comparison.cases()})
    lines = []
    for name, kind in product(FAMILIES, KINDS):
        found = [(n, comparison.cases(name, n)) for n in budgets]
        ratios = [comparison.against(kind, c) if c else (np.nan, np.nan) for _, c in found]
        values = [value for value, _ in ratios if not np.isnan(value)]
        if values:
            lines.append((np.mean(np.log(values)), [name, KINDS[kind][0], *map(cell, ratios)]))
    worst = defaultdict(lambda: -np.inf)
    for mean, (name, *_) in lines:
        worst[name] = max(worst[name], mean)
    lines.sort(key=lambda line: (-worst[line[1][0]], -line[0]))
    header = ["", "evaluations", *map(str, budgets)]
    return metrics.table(header, [line for _, line in lines])


def cell(ratio: tuple[float, float]) -> str:
    text = sweep.shown(ratio)
    return f"**{text}**" if ratio[0] > 1 else text


def losses(comparison: Comparison, limit: int | None = 8) -> str:
    """The cases in which the best peer is ahead, worst first."""
    found, cases = [], comparison.cases()
    for case in cases:
        ours, theirs = comparison.best("ours", [case]), comparison.best("peer", [case])
        ratio = comparison.ratio([(case, ours, theirs)])
        if ratio[0] > 1:
            row = comparison.rows[case, theirs]
            names = [f"{sampler}, {grid}" for sampler, grid in (theirs, ours)]
            numbers = [f"{case[1]:g}", str(row.evaluations), str(row.steps), sweep.shown(ratio)]
            found.append((ratio[0], [case[0], *numbers, *names]))
    found.sort(key=lambda line: -line[0])
    count = (
        f"Case by case the best of theirs is ahead of the best of ours in {len(found)} of "
        f"{len(cases)} cases (problem, guidance, evaluations)"
    )
    if not found:
        return count + "."
    header = ["problem", "guidance", "evaluations", "its steps", "ours / peer", "the peer", "ours"]
    shown = f"; the worst {limit}" if limit is not None and limit < len(found) else ""
    table = metrics.table(header, [line for _, line in found[:limit]])
    return f"{count}{shown}:\n\n{table}"


def defaults(comparison: Comparison) -> str:
    return pairs(comparison, {", ".join(theirs): (OURS[0], theirs) for theirs in THEIRS})


def same(comparison: Comparison) -> str:
    """With the correction over without it, on the grids that both were run on."""
    names = [name for steps in (grids.common(3), grids.above_zero(3)) for name in steps]
    chosen = {
        f"{method}, {grid}": ((f"Stein {method} (ours)", grid), (f"{method} ({library})", grid))
        for grid, (method, library) in product(names, SAME.items())
    }
    return pairs(comparison, chosen)


def pairs(comparison: Comparison, chosen: dict[str, tuple[Sampler, Sampler]]) -> str:
    """Ours over theirs on images, a row for each pair and a column for each budget."""
    budgets = sorted({case[2] for case in comparison.cases("images")})
    lines = []
    for name, (ours, theirs) in chosen.items():
        found = [comparison.cases("images", n) for n in budgets]
        ratios = [comparison.ratio((c, ours, theirs) for c in cases) for cases in found]
        if not np.isnan([value for value, _ in ratios]).all():
            lines.append([name, *map(cell, ratios)])
    return metrics.table(["evaluations", *map(str, budgets)], lines)


def fitted(path: Path) -> list[str]:
    """All fitted together over the best of the other fits, one for all seeds; nothing without."""
    if not path.exists():
        return []
    logs = defaultdict(lambda: defaultdict(dict))  # logs[problem, steps][method][seed]
    for run in json.loads(path.read_text())["runs"]:
        pixels, bands = np.minimum(run["distance"][:2], sweep.FAILED)
        logs[run["problem"], run["steps"]][run["method"]][run["seed"]] = np.log(pixels * bands) / 2
    lines = defaultdict(dict)
    for (problem, steps), found in logs.items():
        others = [name for name in FITS if name in found]
        if others and "all" in found:
            best = min(others, key=lambda name: np.mean([*found[name].values()]))
            seeds = found["all"].keys() & found[best].keys()
            ratio = sweep.interval([found["all"][s] - found[best][s] for s in sorted(seeds)])
            lines[problem][steps] = f"{cell(ratio)} {best}"
    counts = sorted({steps for line in lines.values() for steps in line})
    rows = [[name, *(line.get(n, "") for n in counts)] for name, line in lines.items()]
    text = "Steps, coefficients and rows fitted together, over the best of the other fits:"
    header = ["steps", *map(str, counts)]
    return ["## Fitted against fitted", text, metrics.table(header, rows)] if rows else []


def covered(rows: list[Row]) -> str:
    """Seeds and libraries of each problem."""
    found = defaultdict(lambda: (set(), set(), set()))
    for row in rows:
        if row.side == "peer":
            levels, seeds, libraries = found[row.problem]
            levels.add(f"{row.guidance:g}")
            seeds.add(row.seed)
            libraries.add(row.sampler.rpartition("(")[2].rstrip(")"))
    cells = [
        [problem, " ".join(sorted(levels)), str(len(seeds)), ", ".join(sorted(libraries))]
        for problem, (levels, seeds, libraries) in found.items()
    ]
    return metrics.table(["problem", "guidance", "seeds", "libraries"], cells)


def everything(comparison: Comparison, rows: list[Row]) -> str:
    """Mean distance of every sampler on the best of its grids, a table for each family."""
    parts = [
        "Geometric means over problems, guidance and seeds, each sampler on the grid that is best "
        "for it. Columns: evaluations at most; steps: how many these make."
    ]
    for name in FAMILIES:
        budgets = sorted({case[2] for case in comparison.cases(name)})
        columns = [comparison.cases(name, n) for n in budgets]
        lines = defaultdict(dict)
        for n, cases in zip(budgets, columns, strict=True):
            for side in ("ours", "peer"):
                for sampler in comparison.samplers(side, cases):
                    mean = comparison.mean(side, sampler, cases)
                    row = comparison.rows.get((cases[0], sampler))
                    held = lines[sampler[0]].get(n)
                    if row and np.isfinite(mean) and (held is None or mean < held[0]):
                        lines[sampler[0]][n] = mean, sampler[1], row.steps
        found = [line for line in lines.items() if line[1]]
        order = sorted(found, key=lambda line: np.mean([v[0] for v in line[1].values()]))
        table = [
            [sampler, " ".join(str(found[n][2]) if n in found else "-" for n in budgets)]
            + [f"{np.exp(found[n][0]):.3f} {found[n][1]}" if n in found else "" for n in budgets]
            for sampler, found in order
        ]
        if table:
            parts += [f"## {name}", metrics.table(["", "steps", *map(str, budgets)], table)]
            fine = [r for r in rows if r.side == "fine" and family(r.problem, r.guidance) == name]
            floor = metrics.geometric_mean([MEASURES["both"](row) for row in fine])
            parts.append(f"The fine solve itself: {floor:.3f}.")
    return "\n\n".join(parts)


def tuning(rows: list[Row]) -> str:
    """Evaluations of one sample that parameters, statistics and fitted grids took."""
    found = defaultdict(list)
    for row in rows:
        if row.tuning:
            found["GITS grids" if row.grid == "GITS" else row.sampler].append(row.tuning)
    cells = [[k, f"{np.mean(v):,.0f}", f"{max(v):,}"] for k, v in found.items()]
    return (
        "Evaluations of the denoiser, those of every sample counted, for one problem, guidance and "
        "number of evaluations: parameters are chosen by distance to the law on noise of its own "
        "and the Karras grid; DPM-Solver-v3's statistics are found once for all numbers of "
        "evaluations, and a derivative counts as two.\n\n"
        + metrics.table(["", "mean", "most"], cells)
    )


def failed(rows: list[Row]) -> str:
    bad, all_of = defaultdict(int), defaultdict(int)
    for row in rows:
        all_of[row.sampler, row.grid] += 1
        bad[row.sampler, row.grid] += not np.isfinite(row.pixels)
    lines = [f"- {', '.join(k)}: in {v} of {all_of[k]} runs." for k, v in bad.items() if v]
    return "\n".join(lines) or "Nothing."


def slower(records: list[dict]) -> str:
    """Ours over the fastest of theirs, for each case."""
    lines = []
    for case in dict.fromkeys(r["case"] for r in records):
        here = [r for r in records if r["case"] == case and not r["program"].startswith("bare")]
        peers = [r for r in here if not r["program"].startswith("ours")]
        ours = [r for r in here if r["program"].startswith("ours")]
        if peers:
            fastest = min(peers, key=lambda r: r["milliseconds"])
            best = min(ours, key=lambda r: r["milliseconds"])
            shown = {r["program"]: r for r in ours if "default" in r["program"] or r is best}
            over = [
                f"{name.removeprefix('ours: ')} {r['milliseconds'] / fastest['milliseconds']:.2f}"
                for name, r in shown.items()
            ]
            lines.append(f"{case}, our {', '.join(over)} times {fastest['program']}")
    return "Time a sample: " + "; ".join(lines) + "."


def times(records: list[dict]) -> str:
    cells = []
    for case in dict.fromkeys(r["case"] for r in records):
        for r in sorted((r for r in records if r["case"] == case), key=lambda r: r["milliseconds"]):
            once = "" if r["compile"] is None else f"{r['compile']:.1f}"
            memory = "" if r["memory"] is None else f"{r['memory']:.0f}"
            cells.append([case, r["program"], f"{r['milliseconds']:.4f}", once, memory])
    header = ["", "program", "ms a sample", "s before the first", "MB of memory"]
    return (
        "Nine evaluations, float32. Network: a batch of 100 of the digits network, natively in JAX "
        "and in torch. Overhead: a denoiser of three operations, a batch of 16. Medians, programs "
        "in turns, those of JAX and of torch in a process each. Before the first: tracing and "
        "compilation. Memory: growth of the process's peak in its first two calls. Torch runs on "
        "one thread or on all, whichever is faster for the case.\n\n" + metrics.table(header, cells)
    )


def plot(comparison: Comparison, path: Path) -> None:
    """A panel for each family: defaults, the best of each side, and what they could reach."""
    shown = [name for name in FAMILIES if comparison.cases(name)]
    options = {"figsize": (2 + 2.6 * len(shown), 3), "layout": "constrained", "squeeze": False}
    figure, axes = plt.subplots(1, max(len(shown), 1), **options)
    lines = {
        "default": ("ours", OURS, "C3-"),
        "best of ours": ("ours", None, "C3:"),
        "best of their defaults": ("peer", THEIRS, "C0-"),
        "best of theirs": ("peer", None, "C0:"),
        "fine solve": ("fine", [compare.FINE], "k--"),
    }
    for axis, name in zip(axes[0], shown, strict=False):
        budgets = sorted({case[2] for case in comparison.cases(name)})
        for label, (side, among, style) in lines.items():
            columns = [comparison.cases(name, n) for n in budgets]
            picks = [comparison.best(side, cases, among) for cases in columns]
            means = [
                np.exp(comparison.mean(side, pick, cases))
                for pick, cases in zip(picks, columns, strict=True)
            ]
            axis.plot(budgets, means, style, label=label, marker=".")
        axis.set(yscale="log", xlabel="evaluations", xticks=budgets)
        axis.set_title(name, size=9)
    axes[0, 0].set_ylabel("distance")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
