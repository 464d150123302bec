"""Side by side with other samplers; one command installs them, runs all and writes the report.

    python benchmarks/peers            # about 20 minutes on two idle cores, and 3 to install
    python benchmarks/peers --quick    # 3 minutes: to see that it runs

Same noise, same grids, same denoiser, equal evaluations. Peers go into `.venv` beside this file,
pinned by the requirements here; --here takes those of the Python that runs it. pip's own settings
(PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS) say where to find torch's wheels without CUDA. Writes
report.md, its figures, its headline in README.md, and quality.csv and speed.json of every run.
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
    files = [HERE / f"requirements{part}.txt" for part in ("", "-alone", "-flax")]
    wanted = "".join(file.read_text() for file in files)
    done = ENVIRONMENT / "installed.txt"
    if done.exists() and done.read_text() == wanted:
        return python
    venv.create(ENVIRONMENT, with_pip=True, clear=True)
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    main, alone, flax = map(str, files)
    subprocess.run([*pip, "-r", main, "-e", f"{ROOT}[bench,diffrax]"], check=True)
    subprocess.run([*pip, "--no-deps", "-r", alone], check=True)
    target = str(ENVIRONMENT / "flax")
    subprocess.run([*pip, "--no-deps", "--target", target, "-r", flax], check=True)
    done.write_text(wanted)
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--here", action="store_true", help="without an environment of its own")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="problems at a time")
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--report", action="store_true", help="write it anew from what was run")
    arguments = parser.parse_args()
    if not arguments.here:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # torch's wheels are of the processor too
        command = [str(install()), str(HERE), "--here", *sys.argv[1:]]
        raise SystemExit(subprocess.run(command, check=False).returncode)
    from peers import report, together

    if not arguments.report:
        flax = ENVIRONMENT / "flax"
        together.run(arguments.quick, arguments.seeds, arguments.jobs, arguments.output, flax)
    print(report.write(arguments.output))
    if arguments.output == HERE and not arguments.quick:
        report.to_readme(HERE, ROOT / "README.md")


if __name__ == "__main__":
    main()
