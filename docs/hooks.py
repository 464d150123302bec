"""What the site needs beyond its configuration, in mkdocs.yml.

What lies beside docs/ joins it, and links lead there as they do in the repository. The classes that
`pytree` makes dataclasses are known as such, and have a signature.
"""

import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath

import griffe
from mkdocs.structure.files import File

PLACES = ("", "peers/", "results/")
BENCHMARKS = [f"benchmarks/{where}*.{kind}" for where in PLACES for kind in ("md", "png")]
BESIDE = ("*.md", *BENCHMARKS, "examples/*.png", "examples/*.py")
FIELDS = ("static", "number")  # of `pytree`
LINK = re.compile(r"(?<=\]\()(\.\./|docs/)[^)#\s]+")


def on_files(files, config):
    """README.md becomes the first page."""
    root = Path(config.config_file_path).parent
    for path in sorted(path for pattern in BESIDE for path in root.glob(pattern)):
        name = path.relative_to(root).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, **_):
    """In the site docs/ is the root."""
    site = page.file.src_uri
    repository = site if page.file.generated_by else join("docs", site)

    def moved(link):
        target = normpath(join(dirname(repository), link[0])).removeprefix("docs/")
        return relpath(target, dirname(site) or ".")

    return LINK.sub(moved, markdown)


class Pytrees(griffe.Extension):
    """Dataclasses by another name: `pytree` with its field `static`, and modules of flax."""

    def on_class_members(self, *, cls, **_):
        decorators = [str(decorator.value) for decorator in cls.decorators]
        if "pytree" not in decorators and "nn.Module" not in map(str, cls.bases):
            return
        name = griffe.ExprName("dataclasses.dataclass")
        cls.decorators.append(griffe.Decorator(name, lineno=None, endlineno=None))
        for attr in cls.attributes.values():
            if isinstance(attr.value, griffe.ExprCall) and str(attr.value.function) in FIELDS:
                attr.value.function = griffe.ExprName("dataclasses.field")
                if not attr.value.arguments:
                    attr.value = None
