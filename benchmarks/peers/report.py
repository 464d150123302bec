"""report.md, quality.png and speed.png from what was run."""

import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import metrics
from peers import compare
from peers.compare import Row

GUIDED_FROM = 3.0
RANGE = range(3, 17)  # evaluations
MARKS = "<!-- peers -->", "<!-- end -->"  # in the README, around what is written there
LIBRARIES = ("torch", "diffusers", "azula", "diffrax", "jax", "jaxlib", "numpy", "steindiff_jax")
NEED_NEWER_PYTHON = {
    "dewml": (3, 12),
    "diffuse-jax": (3, 12),
    "hackable-diffusion": (3, 12),
}


def facts(sizes: compare.Sizes, quick: bool, flax: Path) -> dict:
    """Of this run: date, machine, versions, sizes."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    found = importlib.metadata.distributions(name="diffusers", path=[str(flax)])
    versions["diffusers (Flax)"] = next((d.version for d in found), None)
    processor = platform.processor()
    information = Path("/proc/cpuinfo")
    if information.exists():
        models = [x for x in information.read_text().splitlines() if x.startswith("model name")]
        processor = models[0].split(":")[1].strip() if models else processor
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{processor}, {os.cpu_count()} cores, {platform.system()}",
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
        "python": platform.python_version(),
        "versions": versions,
        "sizes": sizes._asdict(),
        "quick": quick,
        "not run": _not_run(versions),
    }


def _not_run(versions: dict) -> dict[str, str]:
    reasons = {name: "not installed" for name, version in versions.items() if version is None}
    for name, needed in NEED_NEWER_PYTHON.items():
        version = ".".join(map(str, needed))
        reasons[name] = (
            f"needs Python {version} or newer"
            if sys.version_info < needed
            else "no adapter: it could not be tried where this was written, for want of Python "
            f"{version}"
        )
    return reasons


SIDES = {  # a row's side -> those that it may be the best of
    "ours": ("ours", "any of ours"),
    "plain": ("any of ours",),
    "peer": ("peer",),
    "fine": (),
}


class Comparison:
    """The best of each side, case by case.

    A case is (problem, guidance, evaluations, seed), and the best is over samplers and grids, by
    `measure`: "distance" or "rmse".
    """

    def __init__(self, rows: list[Row], measure: str = "distance") -> None:
        self.rows, self.measure = rows, measure
        self.best: dict = {}
        for row in rows:
            case = row.problem, row.guidance, row.evaluations, row.seed
            for side in SIDES[row.side]:
                held = self.best.get((side, *case))
                if held is None or self.of(row) < self.of(held):
                    self.best[side, *case] = row

    def of(self, row: Row) -> float:
        return getattr(row, self.measure)

    def cases(self, **where) -> list[tuple]:
        """Those that a peer and this library both have; where: a predicate on each part."""
        names = ("problem", "guidance", "evaluations", "seed")
        return [
            tuple(case)
            for side, *case in self.best
            if side == "peer"
            and ("any of ours", *case) in self.best
            and all(holds(case[names.index(name)]) for name, holds in where.items())
        ]

    def ratio(self, side: str, cases: list[tuple]) -> float:
        """Geometric mean of that side's best distance over the best peer's."""
        cases = [case for case in cases if (side, *case) in self.best]
        if not cases:
            return float("nan")
        return metrics.geometric_mean(
            [self.of(self.best[side, *case]) / self.of(self.best["peer", *case]) for case in cases]
        )

    def one(self, group, guidance: float, evaluations: int) -> list[tuple[float, str, str, str]]:
        """(distance, side, sampler, grid), best first: one sampler and grid for all problems."""
        found = defaultdict(list)
        for row in self.rows:
            at = row.guidance, row.evaluations
            if at == (guidance, evaluations) and group(row.problem) and row.side != "fine":
                found[row.side, row.sampler, row.grid].append(self.of(row))
        complete = max((len(v) for v in found.values()), default=0)
        means = [
            (metrics.geometric_mean(v) if np.isfinite(v).all() else np.inf, *k)
            for k, v in found.items()
            if len(v) == complete
        ]
        return sorted(means)


def is_network(problem: str) -> bool:
    return problem == compare.NETWORK


GROUPS = {"exact mixtures": lambda problem: not is_network(problem), "digits network": is_network}


def write(output: Path) -> str:
    """report.md, which is returned, and its figures, from the files that `together.run` left."""
    rows = compare.read(output / "quality.csv")
    records = json.loads((output / "speed.json").read_text())
    known = json.loads((output / "facts.json").read_text())
    comparison = Comparison(rows)
    plot_quality(comparison, output / "quality.png")
    plot_speed(records, output / "speed.png")
    parts = [
        "# Side by side",
        opening(known),
        "## Where a peer wins",
        losses(comparison, records),
        "## Best against best",
        "Best of ours / best peer, mean over problems; in brackets corrected solvers alone. A cell "
        "that a peer wins, at 3 to 16 evaluations, is marked *.",
        best_against_best(comparison),
        "The same of each sample's distance to where the ODE leads from its own noise (RMSE). It "
        "has no floor, where sliced-W2 of so few samples cannot fall below the fine solve's own.",
        best_against_best(Comparison(rows, "rmse")),
        "## Headline",
        headline(comparison),
        "![Distance against evaluations](quality.png)",
        "## One sampler and one grid for all problems",
        fixed(comparison),
        "## Coverage",
        coverage(rows),
        "## What tuning took",
        tuning(rows),
        "## Time",
        times(records, known),
        "![Milliseconds a sample](speed.png)",
        "## Not run, and not finite",
        missing(known, rows),
        "## Every sampler",
        everything(comparison),
    ]
    text = "\n\n".join(parts) + "\n"
    (output / "report.md").write_text(text)
    return text


def to_readme(output: Path, readme: Path) -> None:
    """Put the headline of what was run between the marks in the README."""
    known = json.loads((output / "facts.json").read_text())
    versions = ", ".join(f"{k} {v}" for k, v in known["versions"].items() if v)
    table = headline(Comparison(compare.read(output / "quality.csv")))
    text = readme.read_text(encoding="utf-8")
    if MARKS[0] not in text:
        return
    before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    caption = f"{known['date']}, {known['machine']}; {versions}."
    parts = [MARKS[0], table, caption, MARKS[1]]
    readme.write_text(before + "\n\n".join(parts) + after, encoding="utf-8")


def opening(known: dict) -> str:
    sizes = known["sizes"]
    versions = ", ".join(f"{k} {v}" for k, v in known["versions"].items() if v)
    quick = " **A quick run, to see that it runs: no number here means anything.**"
    return (
        f"{known['date']}, {known['machine']}, Python {known['python']}; {versions}."
        f"{quick if known['quick'] else ''}\n\n"
        "Every sampler starts from the same noise and calls the same denoiser, no more often than "
        "the evaluations say. Distances are sliced-W2 relative to the law's projected standard "
        f"deviation, 0 is perfect: of {sizes['samples']} samples to the data (guidance 1) or to "
        "the guided ODE's fine solve (mixtures; every other component is the class asked for), of "
        f"{sizes['network_samples']} to the digits network's own fine solve at that guidance; "
        f"{sizes['seeds']} seed(s). Grids: Karras and log-SNR from 80 to 0.002 for all, and each "
        "library's own default where it has one, of ours DDPM's integer steps. Best means over "
        "samplers and grids, case by case, of the noise that it is measured on: that favours the "
        "side with more samplers, the peers. Means are geometric."
    )


def losses(comparison: Comparison, records: list[dict]) -> str:
    """Every case in which the best peer is ahead, worst first, and every slower loop."""
    lines = []
    keys = sorted({case[:3] for case in comparison.cases(evaluations=lambda n: n in RANGE)})
    found = []
    for key in keys:
        cases = [case for case in comparison.cases() if case[:3] == key]
        ratio = comparison.ratio("any of ours", cases)
        if ratio > 1:
            peer = comparison.best["peer", *cases[0]]
            found.append((ratio, *key, f"{peer.sampler}, {peer.grid}"))
    lines.append(
        f"Best of ours / best peer is above 1 in {len(found)} of {len(keys)} cases "
        "(problem, guidance, evaluations from 3 to 16)" + (":" if found else ".")
    )
    if found:
        cells = [
            [p, f"{w:g}", str(n), f"{ratio:.2f}", name]
            for ratio, p, w, n, name in sorted(found, reverse=True)
        ]
        header = ["problem", "guidance", "evaluations", "ours / peer", "the peer"]
        lines.append(metrics.table(header, cells))
    slower = []
    for case, fastest in fastest_peers(records).items():
        ours = min((r for r in records if _ours(r, case)), key=lambda r: r["milliseconds"])
        default = next(r for r in records if r["program"] == "ours: default" and r["case"] == case)
        for record in (ours, default):
            ratio = record["milliseconds"] / fastest["milliseconds"]
            if ratio > 1:
                slower.append(
                    f"{record['program'].removeprefix('ours: ')}, {case}: {ratio:.2f} times the "
                    f"time of {fastest['program']}"
                )
    lines.append("Time a sample: " + ("; ".join(dict.fromkeys(slower)) or "in no case") + ".")
    return "\n\n".join(lines)


def _ours(record: dict, case: str) -> bool:
    return record["case"] == case and record["program"].startswith("ours")


def fastest_peers(records: list[dict]) -> dict[str, dict]:
    """Case -> the fastest record that is not ours and not the bare denoiser."""
    found = {}
    for case in dict.fromkeys(r["case"] for r in records):
        peers = [
            r
            for r in records
            if r["case"] == case and not r["program"].startswith(("ours", "bare"))
        ]
        if peers:
            found[case] = min(peers, key=lambda r: r["milliseconds"])
    return found


def best_against_best(comparison: Comparison) -> str:
    """Ratios best of ours / best peer by guidance and evaluations."""
    budgets = sorted({case[2] for case in comparison.cases()})
    cells, losses, counted = [], 0, 0
    for group, holds in GROUPS.items():
        for w in sorted({case[1] for case in comparison.cases(problem=holds)}):
            line = [group, f"{w:g}"]
            for n in budgets:
                cases = comparison.cases(problem=holds, guidance=w.__eq__, evaluations=n.__eq__)
                ratio = comparison.ratio("any of ours", cases)
                corrected = comparison.ratio("ours", cases)
                lost = bool(cases) and n in RANGE and ratio > 1
                losses += lost
                counted += bool(cases) and n in RANGE
                text = f"{ratio:.2f} ({corrected:.2f}){'*' if lost else ''}"
                line.append(text if cases else "")
            cells.append(line)
    header = ["", "guidance", *map(str, budgets)]
    return f"{metrics.table(header, cells)}\n\nA peer wins {losses} of {counted} cells."


HEADLINE = {  # name in the table -> sampler, the better of its grids
    "default (ours)": "default",
    "the same in a dynamic threshold (ours)": "default, dynamic threshold",
    "diffusers DPM++ 2M": "DPM++ 2M (diffusers)",
    "diffusers DPM++ 3M": "DPM++ 3M (diffusers)",
    "diffusers UniPC-3": "UniPC-3 (diffusers)",
    "diffusers DEIS-3": "DEIS-3 (diffusers)",
    "k-diffusion Heun": "Heun (k-diffusion's formulas)",
    "iPNDM-3": "iPNDM-3 (diff-sampler's formulas)",
    "iPNDM-4": "iPNDM-4 (diff-sampler's formulas)",
    "azula v-AB-3": "v-AB-3 (azula)",
}


def headline(comparison: Comparison) -> str:
    """Distances of the samplers in common use at 5 and 10 evaluations."""
    columns = [
        (group, w, n)
        for group, w in itertools.product(GROUPS, (1.0, 7.0))
        for n in compare.PLACES
        if comparison.one(GROUPS[group], w, n)
    ]
    lines = {name: [] for name in (*HEADLINE, "best peer", "best of ours", "fine solve")}
    for group, w, n in columns:
        found = comparison.one(GROUPS[group], w, n)
        for name, sampler in HEADLINE.items():
            values = [d for d, _, s, _ in found if s == sampler]
            lines[name].append(min(values, default=np.nan))
        lines["best peer"].append(min(d for d, side, *_ in found if side == "peer"))
        lines["best of ours"].append(min(d for d, side, *_ in found if side != "peer"))
        floor = [
            row.distance
            for row in comparison.rows
            if row.side == "fine" and row.guidance == w and GROUPS[group](row.problem)
        ]
        lines["fine solve"].append(metrics.geometric_mean(floor) if floor else np.nan)
    cells = [[k, *(_number(v) for v in values)] for k, values in lines.items()]
    header = [f"{group}, guidance {w:g}, {n} evaluations" for group, w, n in columns]
    return metrics.table(["", *header], cells)


def _number(value: float) -> str:
    return "-" if np.isnan(value) else "not finite" if np.isinf(value) else f"{value:.3f}"


def fixed(comparison: Comparison) -> str:
    """The best single sampler and grid of each side."""
    cells = []
    for group, holds in GROUPS.items():
        for w, n in sorted({case[1:3] for case in comparison.cases(problem=holds)}):
            found = comparison.one(holds, w, n)
            line = [group, f"{w:g}", str(n)]
            best = [
                next((f for f in found if f[1] in sides), None)
                for sides in (("ours", "plain"), ("peer",))
            ]
            if None in best:
                continue
            line += [f"{f[2]}, {f[3]}: {f[0]:.3f}" for f in best]
            cells.append([*line, f"{best[0][0] / best[1][0]:.2f}"])
    return metrics.table(["", "guidance", "evaluations", "ours", "peer", "ratio"], cells)


def coverage(rows: list[Row]) -> str:
    """Modes, precision and recall of the best sampler of each side, by distance, on Karras."""
    found: dict = {}
    for row in rows:
        if not np.isnan(row.precision):
            side = {"plain": "ours", "fine": "fine solve"}.get(row.side, row.side)
            case = row.problem, row.guidance, row.evaluations, row.seed
            held = found.get((side, *case))
            if held is None or row.distance < held.distance:
                found[side, *case] = row
    cells = []
    for group, holds in GROUPS.items():
        for w, n in sorted({k[2:4] for k in found if holds(k[1]) and k[0] != "fine solve"}):
            for side in ("ours", "peer", "fine solve"):
                chosen = [
                    row
                    for (by, problem, scale, budget, _), row in found.items()
                    if (by, scale) == (side, w) and holds(problem)
                    if budget == n or side == "fine solve"
                ]
                values = [
                    [getattr(row, name) for row in chosen]
                    for name in ("modes", "precision", "recall")
                ]
                cells.append(
                    [group, f"{w:g}", str(n), side]
                    + [f"{np.mean(v):.2f}" if np.isfinite(v).all() else "-" for v in values]
                )
    header = ["", "guidance", "evaluations", "best of", "modes hit", "precision", "recall"]
    return (
        "As in diversity.py, of the sampler that is best by distance, on the Karras grid.\n\n"
        + (metrics.table(header, cells))
    )


def tuning(rows: list[Row]) -> str:
    """Evaluations of one sample that a stabiliser's parameters took, one grid and budget."""
    found = defaultdict(list)
    for row in rows:
        if row.tuning:
            found[row.sampler].append(row.tuning)
    cells = [[k, f"{np.mean(v):,.0f}", f"{max(v):,}"] for k, v in found.items()]
    header = ["", "mean", "most"]
    return (
        "Evaluations of the denoiser, those of every sample counted, to choose a parameter for one "
        "problem, guidance and number of evaluations, by distance to the law on noise of its own "
        "and the Karras grid. Nothing of ours was tuned here.\n\n" + metrics.table(header, cells)
    )


def times(records: list[dict], known: dict) -> str:
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
        "in turns (the Flax scheduler's in a process of its own). Before the first: tracing and "
        "compilation. Memory: growth of the process's peak in its first two calls. Torch runs on "
        "one thread or on all, whichever is faster for the case. The machine's load was "
        f"{known['load']:.1f} at the end; above 2 these times mean little.\n\n"
        + metrics.table(header, cells)
    )


def missing(known: dict, rows: list[Row]) -> str:
    lines = [f"- {name}: {reason}." for name, reason in known["not run"].items()]
    bad, all_of = defaultdict(int), defaultdict(int)
    for row in rows:
        all_of[row.sampler, row.grid] += 1
        bad[row.sampler, row.grid] += not np.isfinite(row.distance)
    lines += [
        f"- {sampler}, {grid}: not finite in {count} of {all_of[sampler, grid]} runs."
        for (sampler, grid), count in bad.items()
        if count
    ]
    return "\n".join(lines) or "Nothing."


def everything(comparison: Comparison) -> str:
    """Mean distance of every sampler, the better of its grids, over problems and guidance."""
    cells = []
    for group, holds in GROUPS.items():
        columns = sorted({case[2] for case in comparison.cases(problem=holds)})
        scales = sorted({case[1] for case in comparison.cases(problem=holds)})
        for guided in (False, True):
            chosen = [w for w in scales if (w >= GUIDED_FROM) == guided]
            lines = defaultdict(dict)
            for n in columns:
                found = defaultdict(list)
                for w in chosen:
                    each = {}
                    for d, _, sampler, _ in comparison.one(holds, w, n):
                        each[sampler] = min(d, each.get(sampler, np.inf))
                    for sampler, d in each.items():
                        found[sampler].append(d)
                for sampler, v in found.items():
                    fine = len(v) == len(chosen) and np.isfinite(v).all()
                    lines[sampler][n] = metrics.geometric_mean(v) if fine else np.inf
            kind = f"{group}, {'guided' if guided else 'guidance 1'}"
            cells += [
                [kind, sampler, *(_number(line.get(n, np.nan)) for n in columns)]
                for sampler, line in sorted(lines.items(), key=lambda item: _mean(item[1]))
            ]
    budgets = sorted({case[2] for case in comparison.cases()})
    width = len(budgets) + 2
    cells = [[*line, *[""] * (width - len(line))] for line in cells]
    return metrics.table(["", "sampler", *map(str, budgets)], cells)


def _mean(line: dict[int, float]) -> float:
    values = [*line.values()]
    return metrics.geometric_mean(values) if np.isfinite(values).all() else np.inf


LINES = {"best of ours": ("any of ours", "C3", "-"), "best peer": ("peer", "C0", "-")}


def plot_quality(comparison: Comparison, path: Path) -> None:
    """A panel for each group and guidance: the best of each side, and some by name."""
    scales = sorted({case[1] for case in comparison.cases()})
    shape = len(GROUPS), len(scales)
    size = 1 + 3 * shape[1], 0.5 + 2.6 * shape[0]
    figure, axes = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
    for (i, (group, holds)), (j, w) in itertools.product(
        enumerate(GROUPS.items()), enumerate(scales)
    ):
        axis = axes[i, j]
        cases = comparison.cases(problem=holds, guidance=w.__eq__)
        budgets = sorted({case[2] for case in cases})
        for label, (side, color, style) in LINES.items():
            means = [
                metrics.geometric_mean(
                    [comparison.best[side, *c].distance for c in cases if c[2] == n]
                )
                for n in budgets
            ]
            axis.plot(budgets, means, style, color=color, label=label, marker="o", ms=3)
        for k, name in enumerate(("default (ours)", "diffusers DPM++ 2M", "iPNDM-3")):
            values = [
                min(
                    (d for d, _, s, _ in comparison.one(holds, w, n) if s == HEADLINE[name]),
                    default=np.nan,
                )
                for n in budgets
            ]
            axis.plot(budgets, values, ":", color=("C1", "C2", "C4")[k], label=name, lw=1.2)
        axis.set(yscale="log", title=f"{group}, guidance {w:g}" if cases else "", xticks=budgets)
        axis.title.set_size(9)
        axis.set_axis_on() if cases else axis.set_axis_off()
    for axis in axes[-1]:
        axis.set_xlabel("evaluations")
    axes[0, 0].set_ylabel("sliced-W2")
    axes[1, 0].set_ylabel("sliced-W2")
    axes[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_speed(records: list[dict], path: Path) -> None:
    cases = list(dict.fromkeys(r["case"] for r in records))
    figure, axes = plt.subplots(
        1, len(cases), figsize=(6.5 * len(cases), 4.5), squeeze=False, layout="constrained"
    )
    for axis, case in zip(axes[0], cases, strict=True):
        chosen = sorted((r for r in records if r["case"] == case), key=lambda r: -r["milliseconds"])
        colors = [
            "C3" if r["program"].startswith("ours") else "0.7" if "bare" in r["program"] else "C0"
            for r in chosen
        ]
        axis.barh([r["program"] for r in chosen], [r["milliseconds"] for r in chosen], color=colors)
        axis.set(xlabel="ms a sample, 9 evaluations", title=case, xscale="log")
        axis.tick_params(axis="y", labelsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)
