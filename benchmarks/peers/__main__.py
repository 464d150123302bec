"""Side by side with other samplers; one command installs them, runs all and writes the report.

    python benchmarks/peers --jobs 16      # hours; stop it, and the same command goes on
    python benchmarks/peers --quick        # to see that it runs; its report is in runs/quick
    python benchmarks/peers --problems clumps grid --parts ours formulas
    python benchmarks/peers --parts time   # timings, on a machine that does nothing else
    python benchmarks/peers --report       # from what was run so far

Same noise, same grids, same denoiser, equal evaluations. Peers go into `.venv` beside this file,
pinned by the requirements here; --here takes those of the Python that runs it. Three of them are
left out under Python 3.12, and MaxDiffusion's schedulers without --maxdiffusion, a checkout. pip's
own settings (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS) say where to find torch's wheels without CUDA.
Each problem, guidance and part has a file of its own in runs/: what was run elsewhere is merged by
copying its files there. Writes report.md, full.md and quality.png.
"""

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENVIRONMENT = HERE / ".venv"
sys.path[:0] = [str(HERE.parent), str(ROOT / "examples")]


def install() -> Path:
    """The environment's Python; does nothing where the same was installed before."""
    python = ENVIRONMENT / ("Scripts" if os.name == "nt" else "bin") / "python"
    files = [HERE / f"requirements{part}.txt" for part in ("", "-alone", "-flax", "-3.12")]
    wanted = "".join(file.read_text() for file in files)
    done = ENVIRONMENT / "installed.txt"
    if done.exists() and done.read_text() == wanted:
        return python
    venv.create(ENVIRONMENT, with_pip=True, clear=True)
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    main, alone, flax, newer = map(str, files)
    subprocess.run([*pip, "-r", main, "-e", f"{ROOT}[bench,diffrax]"], check=True)
    subprocess.run([*pip, "--no-deps", "-r", alone], check=True)
    if sys.version_info >= (3, 12):
        subprocess.run([*pip, "--no-deps", "-r", newer], check=True)
    target = str(ENVIRONMENT / "flax")
    subprocess.run([*pip, "--no-deps", "--target", target, "-r", flax], check=True)
    done.write_text(wanted)
    return python


def main() -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the peers' arrays are of the processor too
    here = "--here" in sys.argv
    if not here:
        command = [str(install()), str(HERE), "--here", *sys.argv[1:]]
        raise SystemExit(subprocess.run(command, check=False).returncode)
    from peers import compare, libraries, together

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--here", action="store_true", help="without an environment of its own")
    parser.add_argument("--quick", action="store_true")
    several = {"nargs": "+", "metavar": "NAME"}
    names, parts = compare.PROBLEMS, (*libraries.PARTS, "time")
    parser.add_argument("--problems", choices=names, **several)
    parser.add_argument("--parts", default=tuple(libraries.PARTS), choices=parts, **several)
    parser.add_argument("--seeds", type=int, help="default: 5")
    parser.add_argument("--evaluations", nargs="+", type=int, help="default: 3 to 16, networks 10")
    parser.add_argument("--jobs", type=int, default=2, help="problems and parts at a time")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--flax", type=Path, default=ENVIRONMENT / "flax", help="older diffusers")
    parser.add_argument("--maxdiffusion", type=Path, help="a checkout")
    parser.add_argument("--report", action="store_true", help="write it from what was run")
    arguments = parser.parse_args()
    sizes = together.QUICK if arguments.quick else compare.Sizes()
    problems = arguments.problems or (together.QUICK_PROBLEMS if arguments.quick else names)
    sizes = sizes._replace(seeds=arguments.seeds or sizes.seeds)
    if chosen := arguments.evaluations:
        sizes = sizes._replace(evaluations=tuple(chosen), network_evaluations=tuple(chosen))
    output = arguments.output or (HERE / "runs" / "quick" if arguments.quick else HERE)
    if not arguments.report:
        chosen = [part for part in arguments.parts if part != "time"]
        folders = {"flax": arguments.flax}
        if arguments.maxdiffusion:
            folders["maxdiffusion"] = arguments.maxdiffusion.resolve() / "src"
        where = output, folders
        together.run(problems, chosen, sizes, arguments.jobs, *where)
        if "time" in arguments.parts:
            together.time(*where)
    if arguments.report or arguments.quick:
        from peers import report  # needs matplotlib, which those who only run may not have

        print(report.write(output))


if __name__ == "__main__":
    main()
