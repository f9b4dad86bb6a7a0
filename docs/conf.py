"""How Sphinx builds the site; `tools/build_docs.py` calls it with a source folder of its own."""

import re
import warnings
from collections import _tuplegetter  # the fields of named tuples, which autodoc takes for properties
from pathlib import Path

from sphinx.ext.autodoc.mock import _MockObject
from sphinx.util import inspect

import dcn_np

ROOT = Path(__file__).resolve().parent.parent

project = "dcn_np"
version = release = dcn_np.__version__
root_doc = "index"
nitpicky = True
html_theme = "furo"
html_title = f"dcn_np {version}"
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx_gallery.gen_gallery",
]
myst_heading_anchors = 4
templates_path = [str(ROOT / "docs" / "templates")]

# ---- reference of the public names

default_role = "py:obj"
# Frameworks need not be there: docstrings and signatures come from the text of the adapters. With a torch
# that is not there no operators can be registered.
autodoc_mock_imports = ["cupy", "dask", "jax", "onnx", "paddle", "tensorflow", "torch"]
autodoc_mock_imports += ["dcn_np._torch_operators"]
_MockObject.__or__ = lambda self, other: self  # Array | None, while dcn_np.jax is imported
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # the docstrings say types, shapes and dtypes
autodoc_member_order = "bysource"
autosummary_ignore_module_all = False
numpydoc_show_class_members = False  # the template has them

# ---- gallery

warnings.filterwarnings("error", module="__main__")  # what an example does wrong; it is run as __main__
sphinx_gallery_conf = {
    "examples_dirs": [str(ROOT / "docs" / "gallery")],
    "gallery_dirs": ["gallery"],
    "filename_pattern": r"\.py$",
    "capture_repr": (),
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_signature": False,
    "doc_module": ("dcn_np",),
    "backreferences_dir": "backreferences",
    "reference_url": {"dcn_np": None},
    "image_srcset": ["2x"],
    "min_reported_time": 0,
}


# ---- docstrings, which are written to be read in an interpreter


def escape_unpacking(app, what, name, value, options, lines):
    """Let the star in (batch, *spatial) be a star: to Sphinx it begins an emphasis."""
    lines[:] = [re.sub(r"(?<=[ (])\*(?=[a-z_]+\b)", r"\\*", line) for line in lines]


def signature_of_init(app, what, name, value, options, signature, return_annotation):
    """Tell what a class takes whose base is mocked: to autodoc the base takes anything."""
    if what == "class" and signature == "(*args, **kwargs)":
        found = inspect.signature(value.__init__, bound_method=True)
        signature = inspect.stringify_signature(found, show_annotation=False)
    return signature, return_annotation


def link_or_code(app, env, node, contnode):
    """Set `x` as code where it is no name to link to; of a name that is said in full, let Sphinx complain."""
    full = node["reftype"] != "obj" or node["reftarget"].startswith("dcn_np.")
    return None if full else contnode


def skip_fields(app, what, name, member, skip, options):
    """Leave out the fields of named tuples, which the docstrings of their classes describe."""
    return True if isinstance(member, _tuplegetter) else None


def setup(app):
    """Connect what this file defines."""
    app.connect("autodoc-process-docstring", escape_unpacking)
    app.connect("autodoc-process-signature", signature_of_init)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("missing-reference", link_or_code)
