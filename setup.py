"""Build the extension: one static library per instruction set, linked into one stable-ABI module.

GCC and Clang compile it, on Windows clang-cl. The rest is in pyproject.toml. The variable
``DCN_NP_SANITIZE=address,undefined`` builds with sanitizers.
"""

import os
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_clib import build_clib
from setuptools.command.build_ext import build_ext

# The instruction sets of each machine, weakest first: src/isa/<name>.cpp is compiled with these flags.
# Adding one is a line here, a file there, and its name in src/dispatch.cpp.
INSTRUCTION_SETS = {
    "x86_64": {
        "baseline": [],
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": [
            *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
            *("-mavx2", "-mfma", "-mf16c", "-mprefer-vector-width=512"),
        ],
    },
    # Without it a quarter of the sums of a product's inner loop are moved from register to register (GCC 12).
    "aarch64": {"baseline": ["-frename-registers"]},
}
BASELINE_ONLY: dict[str, list[str]] = {"baseline": []}

# Never -ffast-math or -Ofast: they delete the NaN tests that keep reads inside the arrays, and the linker
# then adds start-up code that flushes denormals in the whole process.
COMMON_FLAGS = [
    "-std=c++17",
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    "-Wno-psabi",  # functions on wide vectors are all inlined: no calling convention is at stake
]
RELEASE_FLAGS = ["-O3", "-g0"]
SYSTEM, *_ = sysconfig.get_platform().split("-")
WINDOWS = SYSTEM == "win"
if not WINDOWS:
    COMMON_FLAGS += ["-fPIC", "-fvisibility=hidden"]
# What compiles OpenMP, and what links it. Apple's Clang knows it if asked so, but has no library for it.
OPENMP = {
    "linux": (["-fopenmp"], ["-fopenmp"]),
    "macosx": (["-Xpreprocessor", "-fopenmp"], ["-lomp"]),
    "win": (["-fopenmp"], ["libomp.lib"]),
}
INCLUDE_DIRS = ["src", "dcn_np/kernels"]
LIMITED_API = "0x030B0000"  # CPython 3.11, the first whose stable ABI has the buffer protocol
# A Python without the GIL has no stable ABI before 3.15, and loads only what was built for it.
STABLE_ABI = not sysconfig.get_config_var("Py_GIL_DISABLED")
# One folder per kind of build, whatever the command, so that `pip install` recompiles only what changed.
SANITIZERS = os.environ.get("DCN_NP_SANITIZE", "")
OBJECTS = "-".join(["build/objects", sysconfig.get_platform(), *SANITIZERS.split(",")]).rstrip("-")


def machine():
    """Name the machine built for; unlike ``platform.machine()`` this is right in a cross build too."""
    name = sysconfig.get_platform().rpartition("-")[2]
    return {"amd64": "x86_64"}.get(name, name)


def instruction_sets():
    """Map each instruction set of this machine to its compiler flags."""
    return INSTRUCTION_SETS.get(machine(), BASELINE_ONLY)


def sanitizer_flags(sanitizers):
    """Turn ``"address,undefined"`` into flags; float-cast-overflow is no part of ``undefined``."""
    if "undefined" in sanitizers.split(","):
        sanitizers += ",float-cast-overflow,float-divide-by-zero"
    return [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]


def build_flags():
    """List the flags of every C++ file and those of the link."""
    if not SANITIZERS:
        return COMMON_FLAGS + RELEASE_FLAGS, [cpu_model()] if WINDOWS else ["-Wl,-S"]  # no debug information
    flags = sanitizer_flags(SANITIZERS)
    return [*COMMON_FLAGS, "-O1", "-g", "-fno-omit-frame-pointer", "-DDCN_DEBUG", *flags], flags


def cpu_model():
    """Return Clang's library with what __builtin_cpu_supports reads, which MSVC's linker does not know."""
    command = ["clang", "--rtlib=compiler-rt", "--print-libgcc-file-name"]
    return subprocess.check_output(command, text=True).strip()


def driven(flags):
    """Spell flags of Clang as clang-cl takes them, where that compiles."""
    return [f"/clang:{flag}" for flag in flags] if WINDOWS else flags


def libraries(flags):
    """Describe one static library per instruction set, rebuilt when a header changes."""
    headers = sorted(glob("src/*.hpp") + glob("dcn_np/kernels/*.hpp"))
    return [
        (f"dcn_np_{name}", {
            "sources": [f"src/isa/{name}.cpp"],
            "obj_deps": {"": [*headers, "setup.py"]},
            "include_dirs": INCLUDE_DIRS,
            "cflags": driven(flags + isa_flags),
        })
        for name, isa_flags in instruction_sets().items()
    ]  # fmt: skip


def extensions(flags, link_flags):
    """Describe the extension modules; the engine's relinks when anything in the libraries changed."""
    from Cython.Build import cythonize

    stable = (
        {"define_macros": [("Py_LIMITED_API", LIMITED_API)], "py_limited_api": True} if STABLE_ABI else {}
    )
    openmp_flags, openmp_link_flags = OPENMP.get(SYSTEM, OPENMP["linux"])
    cpp = {**stable, "language": "c++", "include_dirs": INCLUDE_DIRS}
    openmp = Extension(
        "dcn_np.cpu._openmp",
        ["dcn_np/cpu/_openmp.pyx", "src/openmp.cpp"],
        extra_compile_args=driven([*flags, *openmp_flags]),
        extra_link_args=[*link_flags, *openmp_link_flags],
        optional=SYSTEM
        in ("macosx", "win"),  # compilers come without it there; one thread is better than none
        **cpp,
    )
    native = Extension(
        "dcn_np.cpu._native",
        [
            "dcn_np/cpu/_native.pyx",
            *("src/dispatch.cpp", "src/parallel.cpp", "src/memory.cpp", "src/xla.cpp"),
        ],
        extra_compile_args=driven(flags),
        extra_link_args=link_flags,
        **cpp,
    )
    dlpack = Extension(
        "dcn_np._dlpack",
        ["dcn_np/_dlpack.pyx"],
        extra_compile_args=driven([flag for flag in flags if flag != "-std=c++17"]),
        extra_link_args=link_flags,
        **stable,
    )
    directives = {"language_level": 3, "freethreading_compatible": True}
    modules = [native, openmp, dlpack]
    native, openmp, dlpack = cythonize(modules, build_dir="build/cython", compiler_directives=directives)
    # Afterwards, because cythonize would copy what an extension depends on into its build_dir.
    openmp.depends = ["setup.py", "src/openmp.hpp", "src/parallel.hpp"]
    native.depends = ["setup.py", *glob("src/**/*.?pp", recursive=True), *glob("dcn_np/kernels/*.hpp")]
    return [native, openmp, dlpack]


def use_clang(compiler):
    """Let Clang stand in for MSVC's compiler, which has no vectors."""
    if compiler.compiler_type == "msvc":
        compiler.initialize()
        compiler.cc = "clang-cl"


class BuildExtension(build_ext):
    """Build the libraries first, also when this command is run alone."""

    def finalize_options(self):
        self.build_temp = OBJECTS
        super().finalize_options()

    def run(self):
        self.run_command("build_clib")
        super().run()

    def build_extensions(self):
        use_clang(self.compiler)
        super().build_extensions()


class BuildLibraries(build_clib):
    """Compile the instruction sets side by side: each is one large translation unit."""

    def finalize_options(self):
        self.build_clib = self.build_temp = OBJECTS
        super().finalize_options()

    def build_libraries(self, libraries):
        use_clang(self.compiler)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda library: super(BuildLibraries, self).build_libraries([library]), libraries))


if __name__ == "__main__":
    compile_flags, link_flags = build_flags()
    setup(
        libraries=libraries(compile_flags),
        ext_modules=extensions(compile_flags, link_flags),
        cmdclass={"build_clib": BuildLibraries, "build_ext": BuildExtension},
        options={"bdist_wheel": {"py_limited_api": "cp311"}} if STABLE_ABI else {},
    )
