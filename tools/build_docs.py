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
RESULTS_OF = SOURCE / "inputs"

# Documents link each other by their paths in the repository. In SOURCE they lie alike, so these links hold on
# the site as they do elsewhere; docs/index.md alone moves, to be the first page.
DOCUMENTS = "*.md", "LICENSE", "CITATION.cff", "docs/*.md", "docs/*.rst", "examples/*/README.md"
RUN = "dcn_np/**/*.py", "dcn_np/**/*.so", "examples/**/*.py", "examples/**/*.npz", "docs/*.py"
FIRST = Path("docs/index.md")


def inputs():
    """Tell what results depend on. Changed examples sphinx-gallery finds by itself, but not removed ones."""
    changed = [f"{path} {path.stat().st_mtime_ns}" for pattern in RUN for path in ROOT.glob(pattern)]
    return "\n".join(sorted([*changed, *map(str, ROOT.glob("docs/gallery/*/*"))]))


def forget_results():
    """Build all anew, and let all examples run again, if what they show may have changed."""
    now = inputs()
    if not RESULTS_OF.exists() or RESULTS_OF.read_text() != now:
        for folder in (SOURCE, CACHE, SITE):
            shutil.rmtree(folder, ignore_errors=True)
        SOURCE.mkdir(parents=True)
        RESULTS_OF.write_text(now)


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
        shutil.rmtree(CACHE, ignore_errors=True)  # a page that is read again warns again
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
    print(SITE / "index.html")
