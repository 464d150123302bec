"""Puts examples/, which holds the trained networks, where Python finds it."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "examples"))
