"""The examples of README.md run as they stand, top to bottom, each block after the one before."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.skipif(not BLOCKS, reason="README.md has no python block")
def test_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # whatever they write
    names = {"__name__": "readme"}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
