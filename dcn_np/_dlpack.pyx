# cython: language_level=3, boundscheck=False, wraparound=False
"""DLPack in and out for memory of the CPU: capsules of other libraries as buffers, our arrays as capsules.

Nothing that a capsule says is believed before it is checked, and its deleter is called exactly once, also
where it is refused. See the DLPack specification, versions 0.8 (unversioned) and 1.0.
"""

from cpython.buffer cimport (
    PyBUF_STRIDES, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.pycapsule cimport (
    PyCapsule_GetName, PyCapsule_GetPointer, PyCapsule_IsValid, PyCapsule_New, PyCapsule_SetName,
)
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport strcmp


cdef extern from "Python.h":
    int Py_IsInitialized() noexcept nogil


cdef struct Device:
    int32_t device_type
    int32_t device_id


cdef struct DataType:
    uint8_t code
    uint8_t bits
    uint16_t lanes


cdef struct Tensor:
    void* data
    Device device
    int32_t ndim
    DataType dtype
    int64_t* shape
    int64_t* strides
    uint64_t byte_offset


cdef struct Managed:
    Tensor tensor
    void* context
    void (*deleter)(Managed*) noexcept nogil


cdef struct Versioned:
    uint32_t major
    uint32_t minor
    void* context
    void (*deleter)(Versioned*) noexcept nogil
    uint64_t flags
    Tensor tensor


cdef struct Exchange:
    # DLPackExchangeAPI of version 1, as far as it is used: a library's C functions for a type of arrays.
    uint32_t major
    uint32_t minor
    void* previous
    void* allocate
    int (*from_array)(PyObject* array, Versioned** to) except -1
    int (*to_array)(Versioned* tensor, PyObject** to) except -1  # the tensor is the library's then
    int (*lend)(PyObject* array, Tensor* to) except -1  # what the array keeps; may be NULL


cdef enum:
    CPU = 1
    CUDA_HOST = 3
    READ_ONLY = 1
    FLOAT = 2
    BFLOAT = 4
    BOOL = 6
    MOST_AXES = 64

cdef int64_t MOST_BYTES = 2**62


cdef class Memory:
    """The memory of a capsule, through the buffer protocol; a bfloat16 is the 16-bit integer of its bits.

    Attributes
    ----------
    is_bfloat16 : bool
        Whether the elements are bfloat16.
    """

    cdef Managed* managed
    cdef Versioned* versioned
    cdef char* data
    cdef bint writable
    cdef readonly bint is_bfloat16
    cdef int ndim
    cdef Py_ssize_t itemsize
    cdef Py_ssize_t size
    cdef Py_ssize_t shape[MOST_AXES]
    cdef Py_ssize_t strides[MOST_AXES]
    cdef char format[2]

    def __dealloc__(self):
        if self.managed != NULL and self.managed.deleter != NULL:
            self.managed.deleter(self.managed)
        if self.versioned != NULL and self.versioned.deleter != NULL:
            self.versioned.deleter(self.versioned)

    def __getbuffer__(self, Py_buffer* view, int flags):
        if flags & PyBUF_WRITABLE and not self.writable:
            raise BufferError("the memory is read-only")
        if (flags & PyBUF_STRIDES) != PyBUF_STRIDES:
            raise BufferError("the memory may have gaps: ask for strides")
        view.buf = self.data
        view.obj = self
        view.len = self.size * self.itemsize
        view.itemsize = self.itemsize
        view.readonly = not self.writable
        view.ndim = self.ndim
        view.format = self.format
        view.shape = self.shape
        view.strides = self.strides
        view.suboffsets = NULL
        view.internal = NULL

    cdef int fill(self, Tensor* tensor) except -1:
        cdef int64_t size = 1, bytes_left, step
        cdef int axis
        if tensor.device.device_type != CPU and tensor.device.device_type != CUDA_HOST:
            raise BufferError(f"its capsule says device type {tensor.device.device_type}, not the CPU's")
        if tensor.dtype.lanes != 1:
            raise BufferError(f"its elements have {tensor.dtype.lanes} lanes; wanted 1")
        self.is_bfloat16 = tensor.dtype.code == BFLOAT
        if tensor.dtype.code == FLOAT and tensor.dtype.bits in (16, 32, 64):
            self.format[0] = c"e" if tensor.dtype.bits == 16 else c"f" if tensor.dtype.bits == 32 else c"d"
        elif tensor.dtype.code == BFLOAT and tensor.dtype.bits == 16:
            self.format[0] = b"H"
        elif tensor.dtype.code == BOOL and tensor.dtype.bits == 8:
            self.format[0] = b"?"
        else:
            kinds = {0: "int", 1: "uint", 2: "float", 3: "handle", 4: "bfloat", 5: "complex", 6: "bool"}
            kind = kinds.get(tensor.dtype.code, f"kind {tensor.dtype.code} of ")
            raise TypeError(
                f"it holds {kind}{tensor.dtype.bits}; wanted float32, float64, float16 or bfloat16"
            )
        self.format[1] = 0
        self.itemsize = tensor.dtype.bits // 8
        if not 0 <= tensor.ndim <= MOST_AXES:
            raise BufferError(f"its capsule says {tensor.ndim} axes")
        self.ndim = tensor.ndim
        if self.ndim > 0 and tensor.shape == NULL:
            raise BufferError("its capsule has no shape")
        for axis in range(self.ndim):
            if tensor.shape[axis] < 0:
                raise BufferError(f"its capsule says extent {tensor.shape[axis]} of axis {axis}")
            self.shape[axis] = tensor.shape[axis]
            if tensor.shape[axis] == 0:
                size = 0
        if size > 0:
            for axis in range(self.ndim):
                if tensor.shape[axis] > MOST_BYTES // self.itemsize // size:
                    raise BufferError("its capsule says more elements than memory can hold")
                size *= tensor.shape[axis]
        self.size = size
        step = self.itemsize
        bytes_left = MOST_BYTES
        for axis in range(self.ndim - 1, -1, -1):
            if tensor.strides != NULL and size > 0 and tensor.shape[axis] > 1:
                if not -MOST_BYTES // self.itemsize <= tensor.strides[axis] <= MOST_BYTES // self.itemsize:
                    raise BufferError(f"its capsule says stride {tensor.strides[axis]} of axis {axis}")
                self.strides[axis] = tensor.strides[axis] * self.itemsize
                if abs(self.strides[axis]) > bytes_left // (tensor.shape[axis] - 1):
                    raise BufferError("its capsule's strides reach farther than memory does")
                bytes_left -= abs(self.strides[axis]) * (tensor.shape[axis] - 1)
            else:
                self.strides[axis] = step
            step *= tensor.shape[axis] if tensor.shape[axis] > 0 else 1
        if tensor.data == NULL and size > 0:
            raise BufferError("its capsule has no data")
        if tensor.byte_offset > <uint64_t> MOST_BYTES:
            raise BufferError(f"its capsule says a byte offset of {tensor.byte_offset}")
        self.data = <char*> (<uintptr_t> tensor.data + <uintptr_t> tensor.byte_offset)
        return 0

    cdef int fill_versioned(self) except -1:
        if self.versioned.major != 1:
            raise BufferError(f"its capsule has version {self.versioned.major} of DLPack; wanted 1")
        self.writable = not self.versioned.flags & READ_ONLY
        return self.fill(&self.versioned.tensor)


def memory_of(capsule):
    """Take over the tensor in a capsule.

    Parameters
    ----------
    capsule : PyCapsule
        Named "dltensor" or "dltensor_versioned", of memory that the CPU can read; it is used up.

    Returns
    -------
    Memory
        The capsule's memory, which lives as long.

    Raises
    ------
    TypeError
        No capsule, or of elements that are no floating-point numbers.
    BufferError
        The capsule is used up, or what it says cannot be.
    """
    cdef Memory memory = Memory()
    if PyCapsule_IsValid(capsule, "dltensor_versioned"):
        memory.versioned = <Versioned*> PyCapsule_GetPointer(capsule, "dltensor_versioned")
        PyCapsule_SetName(capsule, "used_dltensor_versioned")
        memory.fill_versioned()
    elif PyCapsule_IsValid(capsule, "dltensor"):
        memory.managed = <Managed*> PyCapsule_GetPointer(capsule, "dltensor")
        PyCapsule_SetName(capsule, "used_dltensor")
        memory.writable = True
        memory.fill(&memory.managed.tensor)
    elif type(capsule).__name__ == "PyCapsule":
        raise BufferError("its capsule is used up, or none of DLPack")
    else:
        raise TypeError(f"its __dlpack__() is a {type(capsule).__name__}; wanted a capsule")
    return memory


def is_exchange(capsule):
    """Tell whether something is DLPack's table of C functions, of a version that is known here."""
    if not PyCapsule_IsValid(capsule, "dlpack_exchange_api"):
        return False
    return (<Exchange*> PyCapsule_GetPointer(capsule, "dlpack_exchange_api")).major == 1


def device_by(exchange, array):
    """Return what the array's `__dlpack_device__` does, sooner; None where there is no C function for that.

    Arguments are those of `memory_by`.
    """
    cdef Tensor tensor
    tensor.device.device_type = tensor.device.device_id = 0
    table = <Exchange*> PyCapsule_GetPointer(exchange, "dlpack_exchange_api")
    if table.lend == NULL:
        return None
    table.lend(<PyObject*> array, &tensor)
    return tensor.device.device_type, tensor.device.device_id


def memory_by(exchange, array):
    """Take over the tensor that a library's C function makes of an array: what `__dlpack__` gives, sooner.

    Parameters
    ----------
    exchange : PyCapsule
        One that `is_exchange`, of the type of `array` itself: the function believes that.
    array : object
        An array in memory that the CPU can read.

    Returns
    -------
    Memory
        As of `memory_of`, which raises the same.
    """
    cdef Memory memory = Memory()
    cdef Versioned* made = NULL
    (<Exchange*> PyCapsule_GetPointer(exchange, "dlpack_exchange_api")).from_array(<PyObject*> array, &made)
    if made == NULL:
        raise BufferError("its C function made nothing")
    memory.versioned = made
    memory.fill_versioned()
    return memory


# ---- out


cdef struct Owned:
    # What a capsule of ours leaves to its consumer: one of the two, and the memory behind it.
    Managed managed
    Versioned versioned
    PyObject* array
    Py_buffer view
    int64_t shape[MOST_AXES]
    int64_t strides[MOST_AXES]


cdef void release(Owned* owned) noexcept with gil:
    PyBuffer_Release(&owned.view)
    Py_DECREF(<object> owned.array)
    free(owned)


cdef void delete_managed(Managed* managed) noexcept nogil:
    # Memory that outlives the interpreter goes with the process.
    if managed != NULL and Py_IsInitialized():
        release(<Owned*> managed.context)


cdef void delete_versioned(Versioned* versioned) noexcept nogil:
    if versioned != NULL and Py_IsInitialized():
        release(<Owned*> versioned.context)


cdef void drop_capsule(object capsule) noexcept:
    # Whoever consumed the capsule has renamed it, and deletes its tensor.
    cdef const char* name = PyCapsule_GetName(capsule)
    if name != NULL and strcmp(name, "dltensor") == 0:
        delete_managed(<Managed*> PyCapsule_GetPointer(capsule, "dltensor"))
    elif name != NULL and strcmp(name, "dltensor_versioned") == 0:
        delete_versioned(<Versioned*> PyCapsule_GetPointer(capsule, "dltensor_versioned"))


cdef class Exported:
    """An array of ours as other libraries take it, without a copy.

    Parameters
    ----------
    array : object
        Writable memory through the buffer protocol: float16, float32 or float64, or the bits of bfloat16.
    is_bfloat16 : bool
        Whether the elements are the bits of bfloat16.
    """

    cdef object array
    cdef bint is_bfloat16

    def __init__(self, array, bint is_bfloat16=False):
        self.array = array
        self.is_bfloat16 = is_bfloat16

    def __dlpack_device__(self):
        """Return the CPU."""
        return CPU, 0

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        """Return a capsule, versioned where the consumer knows versions."""
        if dl_device is not None and tuple(dl_device) != (CPU, 0):
            raise BufferError("the array lies in the memory of the CPU")
        if copy:
            raise BufferError("no copy is made here")
        cdef bint versioned = max_version is not None and max_version[0] >= 1
        cdef Owned* owned = self.own(versioned)
        if versioned:
            return PyCapsule_New(&owned.versioned, "dltensor_versioned", drop_capsule)
        return PyCapsule_New(&owned.managed, "dltensor", drop_capsule)

    cdef Owned* own(self, bint versioned) except NULL:
        # The tensor in it belongs to who calls its deleter.
        cdef Owned* owned = <Owned*> malloc(sizeof(Owned))
        if owned == NULL:
            raise MemoryError
        try:
            PyObject_GetBuffer(self.array, &owned.view, PyBUF_STRIDES | PyBUF_WRITABLE)
        except BaseException:
            free(owned)
            raise
        Py_INCREF(self.array)
        owned.array = <PyObject*> self.array
        cdef Tensor* tensor = &owned.versioned.tensor if versioned else &owned.managed.tensor
        tensor.data = owned.view.buf
        tensor.device.device_type, tensor.device.device_id = CPU, 0
        tensor.ndim = owned.view.ndim
        tensor.dtype.code = BFLOAT if self.is_bfloat16 else FLOAT
        tensor.dtype.bits = <uint8_t> (8 * owned.view.itemsize)
        tensor.dtype.lanes = 1
        tensor.shape, tensor.strides, tensor.byte_offset = owned.shape, owned.strides, 0
        for axis in range(owned.view.ndim):
            owned.shape[axis] = owned.view.shape[axis]
            owned.strides[axis] = owned.view.strides[axis] // owned.view.itemsize
        if versioned:
            owned.versioned.major, owned.versioned.minor, owned.versioned.flags = 1, 0, 0
            owned.versioned.context = owned
            owned.versioned.deleter = delete_versioned
        else:
            owned.managed.context = owned
            owned.managed.deleter = delete_managed
        return owned


def array_by(exchange, Exported exported):
    """Return an array of another library over the memory of ours: what its `from_dlpack` gives, sooner.

    Parameters
    ----------
    exchange : PyCapsule
        One that `is_exchange`, of the type of arrays wanted.
    exported : Exported
        Ours.

    Returns
    -------
    object
        The array.

    Raises
    ------
    BufferError
        The library's C function made nothing; what else it raises is passed on.
    """
    cdef PyObject* made = NULL
    table = <Exchange*> PyCapsule_GetPointer(exchange, "dlpack_exchange_api")
    table.to_array(&exported.own(True).versioned, &made)
    if made == NULL:
        raise BufferError("its C function made nothing")
    array = <object> made
    Py_DECREF(array)
    return array
