"""Runs `eight_devices.py` where JAX sees eight devices, which is settled when a process starts."""

import os
import subprocess
import sys
from pathlib import Path


def test_on_eight_devices():
    script = Path(__file__).with_name("eight_devices.py")
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", script],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
