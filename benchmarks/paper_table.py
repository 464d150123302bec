"""The experiment of the paper's table: FID against evaluations, plain and corrected.

    python paper_table.py                  # dry run: the digits in a classifier's features, minutes
    python paper_table.py --images ../../shared/data  # the same of the network of small photographs
    python paper_table.py ddpm-ema-bedroom-256 --reference bedroom --features inception.pt
    python paper_table.py ddpm-cifar10-32 --reference cifar10-32x32.npz --features inception.pt
    python paper_table.py edm-cifar10-32x32-cond-vp.pkl --reference ... --features inception.pt

50,000 samples for each cell of {solver} x {EDM, log-SNR grid} x {5, 6, 8, 10, 20 evaluations} x
{plain, the default rule, the paper's}, from a folder of diffusers (`load_diffusers`) or a file of
EDM, guided-diffusion or consistency models (`load_edm`); a network that knows classes is asked for
all in turn. Reference and features as in fid.py; latents need a `module:function` that decodes them
first. A finished cell is written to the --output at once and not computed again by a run that goes
on. Everything streams: no image is kept.
"""

import argparse
import csv
import itertools
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

import _path  # noqa: F401
import digits
import fid
import metrics
import steindiff_jax as sd
import sweep

EVALUATIONS = (5, 6, 8, 10, 20)
GRIDS = {"EDM": sd.karras_sigmas, "log-SNR": sd.log_snr_sigmas}
SOLVERS = {name: sweep.SOLVERS[name] for name in ("2M", "3M", "UniPC-3", "Heun", "iPNDM-3")}
CORRECTIONS = {
    "plain": lambda solver: solver,
    "default": sd.Stein,
    "paper": lambda solver: sd.Stein(solver, sd.CleanTarget(), sd.Hutchinson(), sd.Whole()),
}


CLASSES = ("num_class_embeds", "num_embeds_ada_norm", "label_dim")  # what networks call them


def steps_of(solver: str, evaluations: int) -> int:
    """As many as the evaluations allow; Heun takes two a step, and one in the last to 0."""
    return (evaluations + 1) // 2 if solver == "Heun" else evaluations


def checkpoint(options: argparse.Namespace) -> tuple[sd.Denoiser, tuple[int, ...], dict]:
    """Denoiser of the samples, shape of one, and the ends of the noise levels that it knows."""
    from steindiff_jax.interop.checkpoints import load_diffusers
    from steindiff_jax.interop.edm import load_edm

    if Path(options.checkpoint).is_dir():
        found = load_diffusers(options.checkpoint)
    else:
        found = load_edm(
            options.checkpoint,
            noise_schedule=options.noise_schedule,
            num_head_channels=options.num_head_channels,
            use_new_attention_order=options.use_new_attention_order,
        )
    module, betas = found.module, getattr(found.schedule, "betas", None)
    counts = [getattr(module, name, None) for name in CLASSES]
    classes = next((count for count in counts if count), 0)
    cond = {"class_labels": np.arange(options.samples) % classes} if classes else {}
    denoiser = sd.from_linen(**found._asdict(), cond=cond)
    ends = {"sigma_min": options.sigma_min, "sigma_max": options.sigma_max}
    if betas is not None:  # the first and the last level that it was trained on
        ratios = found.schedule.ratio(np.array([0.0, len(betas) - 1.0]))
        ends = {name: ends[name] or float(r) for name, r in zip(ends, ratios, strict=True)}
    event = (options.size, options.size, module.in_channels)
    ends = {name: end for name, end in ends.items() if end}
    return sd.StaticThreshold(denoiser) if options.clip else denoiser, event, ends


def dry_run(options: argparse.Namespace) -> tuple:
    """Labels -> denoiser, features, and the data, of the digits or of small photographs."""
    if not options.images:
        return digits.load, fid.digits_classifier(), digits.images()[0]
    import images
    import images_classifier

    return images.load, images_classifier.features, images.images(options.images, "test")[0]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", help="folder or file; none: the digits")
    parser.add_argument("--images", type=Path, help="CIFAR-10, for a dry run on examples/images.py")
    parser.add_argument("--reference", help="folder, or .npz of mu and sigma")
    parser.add_argument("--features", help="file.pt, folder of transformers, module:function")
    parser.add_argument("--size", type=int, default=32, help="pixels along a side")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--clip", action="store_true", help="x0 to [-1, 1], as DDPM's pipelines do")
    parser.add_argument("--sigma-min", type=float)
    parser.add_argument("--sigma-max", type=float)
    parser.add_argument("--noise-schedule", default="linear", help="these three: see load_edm")
    parser.add_argument("--num-head-channels", type=int, default=64)
    parser.add_argument("--use-new-attention-order", action="store_true")
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=[*SOLVERS])
    parser.add_argument("--evaluations", nargs="+", type=int, default=EVALUATIONS)
    parser.add_argument("--output", type=Path, help="default here, named by what is sampled")
    return parser


def main() -> None:
    options = parser().parse_args()
    options.samples = options.samples or (50_000 if options.checkpoint else 1_000)
    dry = "images" if options.images else "digits"
    name = f"paper_table-{Path(options.checkpoint or dry).name}-{options.samples}.csv"
    output = options.output or Path(__file__).with_name(name)
    if options.checkpoint is None:
        print("dry run: features of a small classifier; no published FID compares")
        load, features, data = dry_run(options)
        reference, event, ends = fid.statistics([data], features), data.shape[1:], {}
        denoiser = load(np.arange(options.samples) % 10)
    else:
        if not (options.reference and options.features):
            parser().error("a checkpoint needs --reference and --features")
        denoiser, event, ends = checkpoint(options)
        features = fid.load_features(options.features)
        reference = fid.load_reference(options.reference, features)

    done = {}
    if output.exists():
        with output.open(newline="") as file:
            done = {tuple(row[:4]): row[4:] for row in csv.reader(file)}
    names = itertools.product(options.solvers, GRIDS, options.evaluations, CORRECTIONS)
    for s, g, evaluations, c in tqdm(list(names)):
        if (cell := (s, g, str(evaluations), c)) in done:
            continue
        k, most = (steps_of(s, n) for n in (evaluations, max(options.evaluations)))
        samples = sd.sample_many(
            jax.random.key(0),
            denoiser,
            options.samples,
            options.batch,
            event,
            sigmas=sweep.padded(np.asarray(GRIDS[g](k, **ends)), most),
            solver=CORRECTIONS[c](SOLVERS[s]),
        )
        done[cell] = fid.cells(reference, fid.statistics(samples, features))
        with output.open("a", newline="") as file:
            csv.writer(file).writerow([*cell, *done[cell]])
    print(table(done, options))


def table(done: dict, options: argparse.Namespace) -> str:
    """Fréchet distances, plain / default / paper, the best of each column in bold."""
    rows = []
    columns = [(g, str(n)) for g in GRIDS for n in options.evaluations]
    best = {
        column: min((float(v[0]) for (_, *k, _), v in done.items() if tuple(k) == column))
        for column in columns
    }
    for s, c in itertools.product(options.solvers, CORRECTIONS):
        found = [(float(done[s, *column, c][0]), best[column]) for column in columns]
        rows.append([s, c, *(f"**{v:.3f}**" if v == low else f"{v:.3f}" for v, low in found)])
    return metrics.table(["solver", "", *(f"{g} {n}" for g, n in columns)], rows)


if __name__ == "__main__":
    main()
