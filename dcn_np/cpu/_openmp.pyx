# cython: language_level=3
"""OpenMP's threads for `_native`: in a module of its own, because its library cannot be loaded everywhere."""

from cpython.pycapsule cimport PyCapsule_New


cdef extern from "openmp.hpp" namespace "dcn" nogil:
    cdef struct Runtime:
        pass

    const Runtime* openmp_runtime() noexcept


def runtime():
    """Return what `_native.use_runtime` takes."""
    return PyCapsule_New(<void*> openmp_runtime(), b"dcn_np.runtime", NULL)
