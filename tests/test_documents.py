"""The examples of README.md and docs/ run as they stand; the API pages name all that is public."""

import inspect
import re
from pathlib import Path

import jax
import pytest

import steindiff_jax as sd
from steindiff_jax.interop import diffrax

pytest.importorskip("sklearn", reason="examples need pip install -e '.[dev]'")
ROOT = Path(__file__).parent.parent
PAGES = {
    file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8")
    for file in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
}
BLOCKS = {
    page: re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for page, text in PAGES.items()
}


@pytest.fixture
def _compile_for_one_run():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.usefixtures("_compile_for_one_run")
@pytest.mark.parametrize("page", [page for page, blocks in BLOCKS.items() if blocks])
def test_blocks_run(page, tmp_path, monkeypatch):
    """Top to bottom, each block after the one before."""
    monkeypatch.chdir(tmp_path)  # whatever they write
    names = {"__name__": "document"}
    for block in BLOCKS[page]:
        exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize("module", [sd, sd.diagnostics, diffrax], ids=lambda m: m.__name__)
def test_api_pages_name_all_that_is_public(module):
    """Of the package, what it exports; of a module, what it defines."""
    api = "".join(text for page, text in PAGES.items() if page.startswith("docs/api/"))
    named = {entry.rsplit(".", 1)[-1] for entry in re.findall(r"^::: (\S+)$", api, re.MULTILINE)}
    public = {
        name
        for name, value in vars(module).items()
        if not (name.startswith("_") or inspect.ismodule(value))
        and (module is sd or getattr(value, "__module__", "") == module.__name__)
    }
    assert len(public) > 5
    assert public <= named
