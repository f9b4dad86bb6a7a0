"""Who may import whom, whether the layers agree about what crosses them, and what `import dcn_np` costs."""

import ast
import inspect
import re
import runpy
import sys
from pathlib import Path

import pytest
from calls import python

import dcn_np
from dcn_np import backends, cpu, cuda, geometry, reference, roi_geometry
from dcn_np.cpu import _native

PACKAGE = Path(dcn_np.__file__).parent
ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "src"

# What each module may import of the package, inside functions too but not for types. The commands, and
# __main__, may import all.
MAY_IMPORT = {
    "dcn_np": {"_requirements", "backends", "cpu", "deform_conv", "feature_mimic", "roi_pool", "threads"},
    "deform_conv": {"arrays", "backends", "docstrings", "geometry"},
    "roi_pool": {"arrays", "backends", "docstrings", "geometry", "roi_geometry"},
    "feature_mimic": {"arrays", "backends", "docstrings", "messages"},
    "docstrings": set(),
    "roi_geometry": {"geometry", "messages"},
    "arrays": {"_dlpack", "messages"},
    "geometry": {"messages"},
    "_requirements": set(),
    "messages": set(),
    "backends": {"cpu", "cuda"},
    "cpu": {
        *("_requirements", "backends", "cpu._native", "cpu._openmp", "geometry", "messages", "roi_geometry"),
        "threads",
    },
    "cuda": {"backends", "cuda.device", "cuda.engine", "cuda.regions", "geometry", "roi_geometry"},
    "cuda.copying": {"cuda.launching", "cuda.modules"},
    "cuda.device": {"cuda.launching", "cuda.modules"},
    "cuda.engine": {
        *(
            "backends",
            "cuda.copying",
            "cuda.fused",
            "cuda.launching",
            "cuda.modules",
            "cuda.tuning",
            "geometry",
        )
    },
    "cuda.regions": {"backends", "cuda.copying", "cuda.launching", "cuda.modules", "roi_geometry"},
    "cuda.fused": {"cuda.launching", "cuda.modules", "geometry"},
    "cuda.launching": {"geometry", "roi_geometry"},
    "cuda.modules": {"cuda.nvrtc"},
    "cuda.tuning": {"cuda.launching", "cuda.modules", "geometry"},
    "cuda.nvrtc": set(),
    "checkpoints": {"geometry", "messages"},
    "_layer": {"arrays", "backends", "checkpoints", "cpu", "geometry", "messages"},
    "_prepared": {"arrays", "backends", "geometry", "messages"},
    "_roi_layers": {"_layer", "arrays", "backends", "checkpoints", "geometry", "roi_geometry", "roi_pool"},
    "layers": {
        "_layer",
        "_prepared",
        "_roi_layers",
        "_state_files",
        "arrays",
        "checkpoints",
        "deform_conv",
        "geometry",
        "messages",
    },
    "_state_files": {"arrays", "messages"},
    "analysis": {
        *("analysis.nodes", "analysis.offset_statistics", "analysis.receptive_field", "analysis.saliency"),
        *("analysis.regions", "analysis.sampling", "analysis.strength", "analysis.views"),
    },
    "analysis.arguments": {"arrays", "messages"},
    "analysis.nodes": {
        *("analysis.arguments", "analysis.regions", "analysis.sampling", "analysis.strength", "arrays"),
        *("feature_mimic", "geometry", "messages"),
    },
    "analysis.offset_statistics": {"analysis.sampling", "messages"},
    "analysis.plot": {"analysis.views", "messages"},
    "analysis.receptive_field": {"analysis.arguments", "messages"},
    "analysis.saliency": {"analysis.arguments", "geometry", "messages"},
    "analysis.sampling": {"arrays", "backends", "geometry", "messages"},
    "analysis.regions": {
        *("analysis.arguments", "analysis.strength", "backends", "docstrings", "geometry"),
        *("roi_geometry", "roi_pool"),
    },
    "analysis.strength": {"analysis.arguments", "deform_conv", "docstrings"},
    "analysis.torch": {
        *("analysis.nodes", "analysis.regions", "analysis.sampling", "analysis.strength", "arrays"),
        *("messages", "roi_pool"),
    },
    "analysis.views": {
        *("analysis.arguments", "analysis.nodes", "analysis.receptive_field", "analysis.saliency"),
        *("analysis.regions", "analysis.sampling", "geometry", "messages"),
    },
    "pth": {"messages"},
    "cgroup": set(),
    "torch": {
        "_torch_mimicking",
        "_torch_operators",
        "_torch_regions",
        "_torch_roi_layers",
        "checkpoints",
        "dcn_np",
        "messages",
    },
    "_torch_mimicking": {"_torch_regions", "geometry", "messages", "roi_geometry"},
    "_torch_operators": set(),
    "_torch_regions": {"_torch_operators", "dcn_np"},
    "_torch_roi_layers": {"_torch_operators", "_torch_regions", "checkpoints"},
    "onnx": {"dcn_np"},
    "paddle": {"dcn_np", "messages"},
    "tensorflow": {"cpu", "dcn_np", "geometry", "messages"},
    "threads": {"cgroup", "cpu._native", "messages"},
    "reference": {"reference.deform_conv", "reference.feature_mimic", "reference.roi_pool"},
    "reference.deform_conv": set(),
    "reference.feature_mimic": {"reference.deform_conv"},
    "reference.roi_pool": {"reference.deform_conv"},
    "tiling": {"geometry", "messages"},
    "dask": {"cpu", "deform_conv", "geometry", "tiling"},
    "jax": {"arrays", "backends", "cpu", "cuda", "deform_conv", "geometry", "threads"},
}

# Each for one framework, or matplotlib, which it imports; nothing imports them but commands and, private
# parts, their adapter.
ADAPTERS = {
    "_torch_mimicking",
    "_torch_operators",
    "_torch_regions",
    "_torch_roi_layers",
    "analysis.plot",
    "analysis.torch",
    "dask",
    "jax",
    "onnx",
    "paddle",
    "tensorflow",
    "torch",
}

# Below the commands, which draw and compare, nothing but NumPy is needed; who has CuPy's arrays has CuPy.
MAY_REQUIRE = {"numpy"}
MAY_ALSO_REQUIRE = {
    "torch": {"torch"},
    "_torch_mimicking": {"torch"},
    "_torch_operators": {"torch"},
    "_torch_regions": {"torch"},
    "_torch_roi_layers": {"torch"},
    "analysis.plot": {"matplotlib"},
    "analysis.torch": {"torch"},
    "onnx": {"onnx", "onnxscript", "torch"},
    "paddle": {"paddle"},
    "tensorflow": {"tensorflow"},
    "cuda": {"ml_dtypes"},
    "cuda.device": {"cupy"},
    "dask": {"dask"},
    "jax": {"jax"},
    "pth": {"ml_dtypes"},
}


def python_modules():
    """Map the dotted name inside the package to the file; the package itself is "dcn_np"."""
    names = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        names[".".join(parts) or "dcn_np"] = file
    return names


MODULES = python_modules()
LAYERED = sorted(name for name in MODULES if name != "__main__" and not name.startswith("commands"))


def is_module(name):
    return name in MODULES or (PACKAGE / (name.replace(".", "/") + ".pyx")).exists()


def absolute(node, file):
    """Return the full dotted name that a `from ... import` reads from."""
    if node.level == 0:
        return node.module
    folder = file.parent
    for _ in range(node.level - 1):
        folder = folder.parent
    parts = ("dcn_np", *folder.relative_to(PACKAGE).parts, *([node.module] if node.module else []))
    return ".".join(parts)


def statements(node):
    """Yield every node that runs: all but those for the type checker."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield child
            yield from statements(child)


def imports(file):
    """Yield the full name of every module that a file imports, wherever the statement stands."""
    for node in statements(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = absolute(node, file)
            for alias in node.names:
                deeper = f"{source}.{alias.name}"
                yield deeper if is_module(deeper.removeprefix("dcn_np.")) else source


def internal_imports(file):
    names = (name for name in imports(file) if name.split(".")[0] == "dcn_np")
    return {name.removeprefix("dcn_np.") for name in names}


@pytest.mark.parametrize("module", LAYERED)
def test_a_module_imports_only_what_lies_below_it(module):
    assert module in MAY_IMPORT, f"a new module: say in MAY_IMPORT what {module} may import"
    assert internal_imports(MODULES[module]) <= MAY_IMPORT[module]


OPERATOR_MODULES = {"deform_conv", "feature_mimic", "roi_pool"}


def test_the_allowed_imports_have_no_cycle_between_operators_and_what_they_stand_on():
    above = OPERATOR_MODULES | {"_roi_layers", "layers", "dcn_np"}
    above |= {name for name in MAY_IMPORT if name.startswith("analysis")}
    below = set(MAY_IMPORT) - above - ADAPTERS
    assert not [name for name in below if above & MAY_IMPORT[name]]


@pytest.mark.parametrize("module", LAYERED)
def test_a_module_requires_numpy_and_the_standard_library_only(module):
    roots = {name.split(".")[0] for name in imports(MODULES[module])}
    allowed = MAY_REQUIRE | MAY_ALSO_REQUIRE.get(module, set()) | {"dcn_np", "__future__"}
    assert roots <= allowed | sys.stdlib_module_names


def test_only_commands_import_the_reference():
    importers = {
        name
        for name, file in MODULES.items()
        if any(imported.partition(".")[0] == "reference" for imported in internal_imports(file))
    }
    allowed = ("commands", "reference")
    assert all(name == "__main__" or name.startswith(allowed) for name in importers)


LOADED = """
import sys, numpy
before = set(sys.modules)
import dcn_np
# Cython makes modules of its own, which have no spec: nothing was loaded for them.
loaded = [name for name in set(sys.modules) - before if getattr(sys.modules[name], "__spec__", None)]
print(*{name.partition(".")[0] for name in loaded})
"""


def test_importing_loads_numpy_and_nothing_else():
    assert set(python(LOADED).split()) - sys.stdlib_module_names == {"dcn_np"}


def parameters(function):
    """Map name to (kind, default); annotations may differ in how they are spelled."""
    found = inspect.signature(function).parameters.values()
    return {p.name: (p.kind, p.default) for p in found if p.name != "self"}


def protocol_functions():
    return [
        name for name, value in vars(backends.Backend).items() if inspect.isfunction(value) and name[0] != "_"
    ]


@pytest.mark.parametrize("backend", [cpu, cuda], ids=lambda backend: backend.__name__)
@pytest.mark.parametrize("name", protocol_functions())
def test_a_backend_has_the_signatures_of_the_protocol(backend, name):
    assert list(parameters(getattr(backend, name))) == list(parameters(getattr(backends.Backend, name)))
    assert parameters(getattr(backend, name)) == parameters(getattr(backends.Backend, name))


def test_the_protocol_has_functions():
    expected = {"deform_conv", "deform_conv_backward", "roi_pool", "roi_pool_backward"}
    assert expected <= set(protocol_functions())


OPERATORS = [
    forward + direction
    for forward in (
        "deform_conv",
        "modulated_deform_conv",
        "roi_align",
        "deform_roi_pool",
        "modulated_deform_roi_pool",
        "deform_psroi_pool",
        "feature_mimic_loss",
    )
    for direction in ("", "_backward")
]


@pytest.mark.parametrize("name", OPERATORS)
def test_the_reference_has_the_public_signatures(name):
    specified = parameters(getattr(reference, name))
    specified.pop("dtype")  # only the specification can be told what to compute in
    assert specified == parameters(getattr(dcn_np, name))
    assert list(specified) == list(parameters(getattr(dcn_np, name)))


def test_gradients_have_the_same_names_in_the_reference():
    assert (
        reference.Gradients._fields == dcn_np.Gradients._fields == ("x", "offset", "mask", "weight", "bias")
    )
    assert reference.RoIGradients._fields == dcn_np.RoIGradients._fields == ("x", "offset", "mask")


def test_geometry_has_one_size_in_python_and_cpp():
    assert _native.geometry_size() == geometry.GEOMETRY_DTYPE.itemsize == 192

    assert _native.roi_geometry_size() == roi_geometry.ROI_GEOMETRY_DTYPE.itemsize == 128


STRUCTS = {
    "geometry.hpp": ("Geometry", geometry.GEOMETRY_DTYPE),
    "roi_geometry.hpp": ("RoIGeometry", roi_geometry.ROI_GEOMETRY_DTYPE),
}
CPP_TYPES = {"int64_t": "<i8", "double": "<f8"}


@pytest.mark.parametrize("header", STRUCTS)
def test_geometry_has_one_order_in_python_and_cpp(header):
    name, dtype = STRUCTS[header]
    text = (PACKAGE / "kernels" / header).read_text()
    struct = re.search(rf"struct {name} \{{(.*?)\n\}};", text, re.DOTALL).group(1)
    fields = re.findall(r"^\s*(int64_t|double) (\w+)(?:\[(kMaxAxes|2)\])?;", struct, re.MULTILINE)
    extents = {"": (), "2": (2,), "kMaxAxes": (3,)}
    in_cpp = [(name, CPP_TYPES[kind], extents[extent]) for kind, name, extent in fields]
    assert in_cpp == [(name, dtype[name].base.str, dtype[name].shape) for name in dtype.names]


def cpp_files():
    return sorted([*SOURCES.rglob("*.?pp"), *(PACKAGE / "kernels").glob("*.hpp")])


def includes(file):
    return re.findall(r'^\s*#\s*include\s*([<"][^>"]+[>"])', file.read_text(), re.MULTILINE)


def own_header(name):
    found = [folder / name for folder in (SOURCES, PACKAGE / "kernels") if (folder / name).exists()]
    assert len(found) == 1, f"{name} is in {found}"
    return found[0]


def all_includes(file, seen):
    """Yield every standard header that a file includes, through our headers too."""
    for name in includes(file):
        if name.startswith("<"):
            yield name
        elif name not in seen:
            seen.add(name)
            yield from all_includes(own_header(name.strip('"')), seen)


@pytest.mark.parametrize("file", sorted(SOURCES.glob("isa/*.cpp")), ids=lambda file: file.stem)
def test_an_instruction_set_includes_no_code_of_the_standard_library(file):
    # An inline function of std compiled for AVX-512 could replace everyone's copy at link time.
    assert set(all_includes(file, set())) <= {"<cstddef>", "<cstdint>"}


@pytest.mark.parametrize("file", cpp_files(), ids=lambda file: file.name)
def test_cpp_knows_no_python(file):
    assert not re.search(r"Python\.h|numpy|PyObject", "".join(includes(file)))


def test_only_the_instruction_sets_include_the_kernels():
    importers = {file.name for file in SOURCES.rglob("*.cpp") if '"kernels.inc.hpp"' in includes(file)}
    assert importers == {file.name for file in SOURCES.glob("isa/*.cpp")}


@pytest.mark.parametrize(
    ("pattern", "owner"),
    [(r"__attribute__\(\(vector_size", "vector.hpp"), (r"#pragma omp|<omp\.h>", "openmp.cpp")],
    ids=["simd", "openmp"],
)
def test_one_file_owns_it(pattern, owner):
    assert {file.name for file in cpp_files() if re.search(pattern, file.read_text())} == {owner}


def test_one_list_of_instruction_sets():
    flags = runpy.run_path(str(ROOT / "setup.py"))["INSTRUCTION_SETS"]["x86_64"]
    files = {file.stem for file in SOURCES.glob("isa/*.cpp")}
    dispatched = re.findall(r"X\((\w+),", (SOURCES / "dispatch.cpp").read_text())
    assert set(flags) == files == set(dispatched)
    assert dispatched[: len(flags)] == list(reversed(flags))
