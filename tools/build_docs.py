"""Build the site into build/docs; fails where a page, a link, an example or a public name is at fault."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

from sphinx.util.inventory import InventoryFile

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dcn_np"
BUILD = ROOT / "build"
SOURCE, CACHE, SITE = BUILD / "docs_source", BUILD / "docs_cache", BUILD / "docs"
FINISHED = CACHE / "finished"

# Documents link each other by their paths in the repository. In SOURCE they lie alike, so these links hold on
# the site as they do elsewhere; docs/index.md alone moves, to be the first page.
DOCUMENTS = "*.md", "LICENSE", "CITATION.cff", "docs/*.md", "docs/*.rst", "examples/*/README.md"
RUN = "dcn_np/**/*.py", "dcn_np/**/*.so", "examples/**/*.py", "examples/**/*.npz", "docs/**/*.py"
FIRST = Path("docs/index.md")


def forget_results():
    """Let the examples run again, and the reference be made again, if what they show may have changed."""
    inputs = [path for pattern in RUN for path in ROOT.glob(pattern)]
    if not FINISHED.exists() or max(path.stat().st_mtime for path in inputs) > FINISHED.stat().st_mtime:
        shutil.rmtree(SOURCE, ignore_errors=True)
    FINISHED.unlink(missing_ok=True)


def stage():
    """Copy every document into SOURCE."""
    for pattern in DOCUMENTS:
        for path in SOURCE.glob(pattern):
            path.unlink()
        for path in ROOT.glob(pattern):
            place = path.relative_to(ROOT)
            copy = SOURCE / (place.name if place == FIRST else place)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copy)


def build():
    """Run Sphinx, with warnings as errors."""
    options = "-c", ROOT / "docs", "-d", CACHE, "--quiet", "--fail-on-warning"
    command = sys.executable, "-m", "sphinx", *options, SOURCE, SITE
    # The examples are small: another thread does not pay.
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"DCN_NP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(done.returncode)


def public_names():
    """Yield the full name of all that a module has in its `__all__`."""
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        for statement in ast.parse(path.read_text()).body:
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
                yield from (f"{module}.{name}" for name in ast.literal_eval(statement.value))


def undocumented():
    """Return the public names that the reference lacks."""
    inventory = InventoryFile.loads((SITE / "objects.inv").read_bytes(), uri="")
    documented = {name for kind, names in inventory.data.items() if kind.startswith("py:") for name in names}
    return sorted(set(public_names()) - documented)


if __name__ == "__main__":
    forget_results()
    stage()
    build()
    if missing := undocumented():
        sys.exit(f"docs/api.rst and the pages below it lack {', '.join(missing)}")
    FINISHED.touch()
    print(SITE / "index.html")
