# cython: language_level=3, boundscheck=False, wraparound=False
"""Arrays to pointers: calls the C++ kernels with the GIL released. No policy, no checks of arguments."""

from cpython.buffer cimport PyBUF_STRIDES, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_New
from libc.stdint cimport int64_t
from libc.string cimport memset
from libcpp cimport bool as cbool


cdef extern from "Python.h" nogil:
    int PyErr_CheckSignals() noexcept


cdef extern from "geometry.hpp" namespace "dcn" nogil:
    cdef struct Geometry:
        int64_t ndim
        int64_t batch
        int64_t out_channels
        int64_t[3] output


cdef extern from "roi_geometry.hpp" namespace "dcn" nogil:
    cdef struct RoIGeometry:
        int64_t batch


cdef extern from "arrays.hpp" namespace "dcn" nogil:
    cdef struct Array:
        char* data
        int64_t batch
        int64_t channel
        int64_t axis[3]

    cdef struct Planes:
        char* data
        int64_t batch
        int64_t channel
        int64_t position


cdef extern from "parallel.hpp" namespace "dcn" nogil:
    cdef enum class Status(int):
        kOk
        kOutOfMemory
        kInterrupted

    cdef struct Interrupt:
        cbool (*pending)(void*) noexcept nogil
        void* context

    cdef struct Runtime:
        pass

    void set_runtime(const Runtime*) noexcept
    cbool has_runtime() noexcept
    int hardware_threads() noexcept
    void set_process_threads(int) noexcept
    void run_serially() noexcept


cdef extern from "memory.hpp" namespace "dcn" nogil:
    void release(void*) noexcept


cdef extern from "dispatch.hpp" namespace "dcn" nogil:
    cdef enum DType:
        pass

    cdef enum class Storage(int):
        kSame

    cdef struct PreparedMemory "dcn::PreparedForward":
        void* weights
        void* space
        int threads

    cdef struct ForwardArguments:
        Geometry geometry
        Storage images
        Storage positions
        Array x
        Planes offset
        Planes mask
        const void* weight
        const void* bias
        Planes output
        const PreparedMemory* prepared

    cdef struct BackwardArguments:
        Geometry geometry
        Storage images
        Storage positions
        Array x
        Planes offset
        Planes mask
        Planes grad_output
        const void* weight
        Array grad_x
        Planes grad_offset
        Planes grad_mask
        void* grad_weight
        void* grad_bias

    cdef struct RoIArrays:
        Storage images
        Storage positions
        const double* rois
        const int64_t* order
        const int64_t* begins
        Array x
        Planes offset
        Planes mask

    cdef struct RoIForwardArguments:
        RoIGeometry geometry
        RoIArrays arrays
        Planes output

    cdef struct RoIBackwardArguments:
        RoIGeometry geometry
        RoIArrays arrays
        Planes grad_output
        Array grad_x
        Planes grad_offset
        Planes grad_mask

    cdef struct Kernels:
        const char* isa

    int isa_count() noexcept
    const Kernels* isa_kernels(int) noexcept
    bint isa_supported(int) noexcept
    int dtype_count() noexcept
    const char* dtype_name(int) noexcept
    int half_count() noexcept
    const char* half_name(int) noexcept
    Status forward(const Kernels&, DType, const ForwardArguments&, int, Interrupt) noexcept
    Status prepare_forward(
        const Kernels&, DType, const ForwardArguments&, int, Interrupt, PreparedMemory&
    ) noexcept
    Status backward(const Kernels&, DType, const BackwardArguments&, int, Interrupt) noexcept
    Status roi_forward(const Kernels&, DType, const RoIForwardArguments&, int, Interrupt) noexcept
    Status roi_backward(const Kernels&, DType, const RoIBackwardArguments&, int, Interrupt) noexcept
    void fill_logistic "dcn::logistic"(
        const Kernels&, DType, const Planes&, Storage, const int64_t (&)[3], double
    ) noexcept


cdef extern from "xla.hpp" namespace "dcn::xla" nogil:
    cdef struct CallFrame:
        pass

    cdef struct Error:
        pass

    Error* xla_forward "dcn::xla::forward"(CallFrame*) noexcept
    Error* xla_backward "dcn::xla::backward"(CallFrame*) noexcept
    void use_isa(int) noexcept


cdef cbool signal_pending(void* context) noexcept with gil:
    return PyErr_CheckSignals() != 0


cdef Interrupt interrupt() noexcept nogil:
    cdef Interrupt value
    value.pending = <cbool (*)(void*) noexcept nogil> signal_pending
    value.context = NULL
    return value


cdef void planes_of(const Py_buffer* view, Planes* to) noexcept:
    # The axes must lie as one: the distance of positions is that of the last axis longer than 1.
    cdef int axis = view.ndim - 1
    while axis > 2 and view.shape[axis] == 1:
        axis -= 1
    to.data = <char*> view.buf
    to.batch = view.strides[0]
    to.channel = view.strides[1]
    to.position = view.strides[axis]


cdef class Buffers:
    """The buffers of one call: taken one by one, released together."""

    cdef Py_buffer views[16]
    cdef int count

    def __dealloc__(self):
        self.release()

    cdef void release(self) noexcept:
        for i in range(self.count):
            PyBuffer_Release(&self.views[i])
        self.count = 0

    cdef Py_buffer* take(self, object array, bint writable=False) except NULL:
        cdef Py_buffer* view = &self.views[self.count]
        PyObject_GetBuffer(array, view, PyBUF_STRIDES | (PyBUF_WRITABLE if writable else 0))
        self.count += 1
        return view

    cdef int array(self, object array, Array* to, bint writable=False) except -1:
        memset(to, 0, sizeof(Array))
        if array is None:
            return 0
        cdef Py_buffer* view = self.take(array, writable)
        to.data = <char*> view.buf
        to.batch = view.strides[0]
        to.channel = view.strides[1]
        for i in range(2, view.ndim):
            to.axis[i - 2] = view.strides[i]
        return 0

    cdef int planes(self, object array, Planes* to, bint writable=False) except -1:
        memset(to, 0, sizeof(Planes))
        if array is not None:
            planes_of(self.take(array, writable), to)
        return 0

    cdef void* data(self, object array, bint writable=False) except? NULL:
        if array is None:
            return NULL
        return self.take(array, writable).buf

    cdef Geometry geometry(self, object record) except *:
        return (<Geometry*> self.take(record).buf)[0]

    cdef RoIGeometry roi_geometry(self, object record) except *:
        return (<RoIGeometry*> self.take(record).buf)[0]

    cdef int roi_arrays(
        self, RoIArrays* to, int images, int positions, object regions, object x, object offset, object mask
    ) except -1:
        to.images = <Storage> images
        to.positions = <Storage> positions
        rois, order, begins = regions
        to.rois = <const double*> self.data(rois)
        to.order = <const int64_t*> self.data(order)
        to.begins = <const int64_t*> self.data(begins)
        self.array(x, &to.x)
        self.planes(offset, &to.offset)
        return self.planes(mask, &to.mask)


cdef int finish(Status status) except -1:
    if status == Status.kOutOfMemory:
        raise MemoryError("no memory for the working space of this call")
    # The exception of the signal handler is already set.
    return -1 if status == Status.kInterrupted else 0


def deform_conv(
    int isa, int dtype, int images, int positions, int threads, geometry,
    x, offset, mask, weight, bias, output,
):
    """Write the convolution to `output`; a flat position axis is required of offset, mask and output.

    `images` and `positions` are numbers of `halves`, counted from 1, or 0 for `dtype`.
    """
    cdef Buffers buffers = Buffers()
    cdef ForwardArguments arguments
    cdef Status status
    arguments.geometry = buffers.geometry(geometry)
    arguments.images = <Storage> images
    arguments.positions = <Storage> positions
    buffers.array(x, &arguments.x)
    buffers.planes(offset, &arguments.offset)
    buffers.planes(mask, &arguments.mask)
    arguments.weight = buffers.data(weight)
    arguments.bias = buffers.data(bias)
    arguments.prepared = NULL
    buffers.planes(output, &arguments.output, True)
    with nogil:
        status = forward(isa_kernels(isa)[0], <DType> dtype, arguments, threads, interrupt())
    finish(status)


cdef class PreparedForward:
    """The packed weights and the working space of calls of one geometry, made one at a time.

    Most arguments are those of `deform_conv`. `weight` is packed; or, if that is not None, what `beside` has
    packed is used, whose calls may run at the same time. `bias` is kept and read by every call. The output's
    channels from `logistic_from` on go through `factor` times the logistic function.
    """

    cdef ForwardArguments arguments
    cdef PreparedMemory memory
    cdef int isa
    cdef int dtype
    cdef int64_t logistic_from
    cdef double factor
    cdef Buffers constants
    cdef Buffers buffers
    cdef PreparedForward packed  # whose weights these are, if not its own
    cdef cbool owns_weights

    def __cinit__(
        self, PreparedForward beside, int isa, int dtype, int images, int positions, int threads, geometry,
        weight, bias, int64_t logistic_from, double factor,
    ):
        cdef Buffers given = Buffers()
        cdef Status status
        self.isa, self.dtype = isa, dtype
        self.logistic_from, self.factor = logistic_from, factor
        self.constants, self.buffers = Buffers(), Buffers()
        self.arguments.geometry = given.geometry(geometry)
        self.arguments.images = <Storage> images
        self.arguments.positions = <Storage> positions
        self.arguments.weight = given.data(weight)
        self.arguments.bias = self.constants.data(bias)
        if beside is not None:
            self.packed = beside if beside.packed is None else beside.packed
            self.memory.weights = self.packed.memory.weights
        self.owns_weights = beside is None
        with nogil:
            status = prepare_forward(
                isa_kernels(isa)[0], <DType> dtype, self.arguments, threads, interrupt(), self.memory
            )
        self.arguments.weight = NULL
        self.arguments.prepared = &self.memory
        finish(status)

    def __dealloc__(self):
        release(self.memory.space)
        if self.owns_weights:
            release(self.memory.weights)

    @property
    def threads(self):
        """The most threads that a call may have."""
        return self.memory.threads

    def run(self, int threads, x, offset, mask, output):
        """Write the convolution to `output`, as `deform_conv` does, and allocate nothing."""
        cdef Status status
        try:
            self.buffers.array(x, &self.arguments.x)
            self.buffers.planes(offset, &self.arguments.offset)
            self.buffers.planes(mask, &self.arguments.mask)
            self.buffers.planes(output, &self.arguments.output, True)
            with nogil:
                status = forward(
                    isa_kernels(self.isa)[0], <DType> self.dtype, self.arguments,
                    min(threads, self.memory.threads), interrupt(),
                )
                if status == Status.kOk:
                    self.make_masks()
            finish(status)
        finally:
            self.buffers.release()

    cdef void make_masks(self) noexcept nogil:
        cdef const Geometry* geometry = &self.arguments.geometry
        cdef Planes made = self.arguments.output
        cdef int64_t[3] extents
        extents[0], extents[1] = geometry.batch, geometry.out_channels - self.logistic_from
        extents[2] = geometry.output[0] * geometry.output[1] * geometry.output[2]
        made.data += self.logistic_from * made.channel
        fill_logistic(
            isa_kernels(self.isa)[0], <DType> self.dtype, made, self.arguments.images, extents, self.factor
        )


def deform_conv_backward(
    int isa, int dtype, int images, int positions, int threads, geometry,
    grad_output, x, offset, mask, weight, grad_x, grad_offset, grad_mask, grad_weight, grad_bias,
):
    """Write the gradients that are not None; all but x and grad_x need a flat position axis."""
    cdef Buffers buffers = Buffers()
    cdef BackwardArguments arguments
    cdef Status status
    arguments.geometry = buffers.geometry(geometry)
    arguments.images = <Storage> images
    arguments.positions = <Storage> positions
    buffers.array(x, &arguments.x)
    buffers.planes(offset, &arguments.offset)
    buffers.planes(mask, &arguments.mask)
    buffers.planes(grad_output, &arguments.grad_output)
    arguments.weight = buffers.data(weight)
    buffers.array(grad_x, &arguments.grad_x, True)
    buffers.planes(grad_offset, &arguments.grad_offset, True)
    buffers.planes(grad_mask, &arguments.grad_mask, True)
    arguments.grad_weight = buffers.data(grad_weight, True)
    arguments.grad_bias = buffers.data(grad_bias, True)
    with nogil:
        status = backward(isa_kernels(isa)[0], <DType> dtype, arguments, threads, interrupt())
    finish(status)


def address(array):
    """Return the address of the first element; NumPy takes a microsecond for it."""
    return <size_t> Buffers().data(array)


def roi_pool(
    int isa, int dtype, int images, int positions, int threads, geometry, regions, x, offset, mask, output,
):
    """Write the average of every bin to `output`; offset, mask and output need a flat position axis.

    `regions` are contiguous: rois (R, 5) in float64, their indices ordered by image, and where in that order
    those of each image begin, with the end (int64).
    """
    cdef Buffers buffers = Buffers()
    cdef RoIForwardArguments arguments
    cdef Status status
    arguments.geometry = buffers.roi_geometry(geometry)
    buffers.roi_arrays(&arguments.arrays, images, positions, regions, x, offset, mask)
    buffers.planes(output, &arguments.output, True)
    with nogil:
        status = roi_forward(isa_kernels(isa)[0], <DType> dtype, arguments, threads, interrupt())
    finish(status)


def roi_pool_backward(
    int isa, int dtype, int images, int positions, int threads, geometry, regions,
    grad_output, x, offset, mask, grad_x, grad_offset, grad_mask,
):
    """Write the gradients that are not None; all but x and grad_x need a flat position axis."""
    cdef Buffers buffers = Buffers()
    cdef RoIBackwardArguments arguments
    cdef Status status
    arguments.geometry = buffers.roi_geometry(geometry)
    buffers.roi_arrays(&arguments.arrays, images, positions, regions, x, offset, mask)
    buffers.planes(grad_output, &arguments.grad_output)
    buffers.array(grad_x, &arguments.grad_x, True)
    buffers.planes(grad_offset, &arguments.grad_offset, True)
    buffers.planes(grad_mask, &arguments.grad_mask, True)
    with nogil:
        status = roi_backward(isa_kernels(isa)[0], <DType> dtype, arguments, threads, interrupt())
    finish(status)


def logistic(int isa, int dtype, int storage, values, double factor):
    """Write factor / (1 + exp(-value)) over each of the values, which need a flat position axis."""
    cdef Py_buffer view
    cdef Planes planes
    cdef int64_t[3] extents
    PyObject_GetBuffer(values, &view, PyBUF_STRIDES | PyBUF_WRITABLE)
    try:
        planes_of(&view, &planes)
        extents[0], extents[1], extents[2] = view.shape[0], view.shape[1], 1
        for axis in range(2, view.ndim):
            extents[2] *= view.shape[axis]
        with nogil:
            fill_logistic(isa_kernels(isa)[0], <DType> dtype, planes, <Storage> storage, extents, factor)
    finally:
        PyBuffer_Release(&view)


def isas():
    """List (name, supported by this processor) of the instruction sets compiled in, best first."""
    return [(isa_kernels(i).isa.decode(), bool(isa_supported(i))) for i in range(isa_count())]


def dtypes():
    """List the names of the dtypes compiled in, in the order of their numbers."""
    return [dtype_name(i).decode() for i in range(dtype_count())]


def halves():
    """List the names of the dtypes that are stored as they are and computed in float32, from number 1 on."""
    return [half_name(i).decode() for i in range(half_count())]


def geometry_size():
    """Return sizeof(Geometry)."""
    return sizeof(Geometry)


def roi_geometry_size():
    """Return sizeof(RoIGeometry)."""
    return sizeof(RoIGeometry)


def use_runtime(capsule):
    """Take threads from a runtime from now on; without one every call has one thread."""
    set_runtime(<const Runtime*> PyCapsule_GetPointer(capsule, b"dcn_np.runtime"))


def has_threads():
    """Return whether there is a runtime."""
    return has_runtime()


def openmp_threads():
    """Return how many threads OpenMP and the affinity mask allow the calling thread."""
    return hardware_threads()


def limit_process_threads(int limit):
    """Bound the threads of calls that do not come from Python."""
    set_process_threads(limit)


def xla_handlers(int isa):
    """Return the functions that XLA calls for the forward and the backward, to run on one instruction set."""
    use_isa(isa)
    return PyCapsule_New(<void*> xla_forward, NULL, NULL), PyCapsule_New(<void*> xla_backward, NULL, NULL)


def after_fork_in_child():
    """Run serially from now on: the threads of the parent's pools do not exist in a forked child."""
    run_serially()
