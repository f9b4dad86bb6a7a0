#include "xla.hpp"

#include <atomic>
#include <cstdio>
#include <cstring>

#include "dispatch.hpp"
#include "xla_abi.hpp"

namespace dcn::xla {

namespace {

std::atomic<int> chosen_isa{0};

// As in geometry.py: no sum of coordinates leaves 64 bits, and no loop over groups of nothing runs for years.
constexpr int64_t kLargest = int64_t{1} << 62;
constexpr int64_t kLargestEmptyGroups = 1 << 16;

enum Role : int { kX, kOffset, kMask, kWeight, kBias, kOutput, kRoles };
const char* const kNames[kRoles] = {"x", "offset", "mask", "weight", "bias", "output"};

constexpr int64_t bit(Role role) { return int64_t{1} << role; }
constexpr int64_t kGradients = bit(kX) | bit(kOffset) | bit(kMask) | bit(kWeight) | bit(kBias);

struct Kind {
  Element element;
  int64_t bytes;
  DType computed;
  Storage storage;
};
const Kind kKinds[] = {
    {kF32, 4, k_float32, Storage::kSame},
    {kF64, 8, k_float64, Storage::kSame},
    {kF16, 2, k_float32, Storage::kFloat16},
    {kBF16, 2, k_float32, Storage::kBFloat16},
};

const Kind* kind_of(Element element) {
  for (const Kind& kind : kKinds)
    if (kind.element == element) return &kind;
  return nullptr;
}

Error* refuse(const CallFrame& frame, Code code, const char* what, const char* which = "") {
  char message[200];
  std::snprintf(message, sizeof message, "dcn_np: %s%s", which, what);
  ErrorRequest request{sizeof request, nullptr, message, code};
  return frame.api->create_error(&request);
}

// ---- what is in a frame

int64_t times(int64_t a,
              int64_t b) {  // of numbers >= 0; what is too large becomes a number that no array has
  int64_t product;
  return __builtin_mul_overflow(a, b, &product) ? INT64_MAX : product;
}

struct Shape {
  int rank = 0;
  int64_t extents[2 + kMaxAxes] = {};

  void append(int64_t extent) { extents[rank++] = extent; }
  void append(const int64_t* axes, int64_t ndim) {
    for (int64_t axis = 0; axis < ndim; ++axis) append(axes[axis]);
  }
};

Shape shape_of(const Geometry& geometry, Role role) {
  Shape shape;
  if (role == kWeight || role == kBias) {
    shape.append(geometry.out_channels);
    if (role == kBias) return shape;
    shape.append(geometry.in_channels / geometry.groups);
    shape.append(geometry.kernel, geometry.ndim);
    return shape;
  }
  shape.append(geometry.batch);
  if (role == kX) {
    shape.append(geometry.in_channels);
    shape.append(geometry.input, geometry.ndim);
    return shape;
  }
  int64_t per_tap = times(geometry.offset_groups, role == kOffset ? geometry.ndim : 1);
  for (int64_t axis = 0; axis < geometry.ndim; ++axis) per_tap = times(per_tap, geometry.kernel[axis]);
  shape.append(role == kOutput ? geometry.out_channels : per_tap);
  shape.append(geometry.output, geometry.ndim);
  return shape;
}

bool addressable(const Shape& shape, int64_t bytes) {  // like NumPy, an extent of 0 counts as 1
  for (int i = 0; i < shape.rank; ++i) bytes = times(bytes, shape.extents[i] > 1 ? shape.extents[i] : 1);
  return bytes < INT64_MAX;
}

bool within(int64_t number, int64_t least) { return number >= least && number <= kLargest; }

bool divides(int64_t groups, int64_t things) {
  return things % groups == 0 && (groups <= things || groups <= kLargestEmptyGroups);
}

bool is_sound(const Geometry& geometry, int axis) {
  const int64_t input = geometry.input[axis], kernel = geometry.kernel[axis], stride = geometry.stride[axis];
  const int64_t padding = geometry.padding[axis], dilation = geometry.dilation[axis];
  const int64_t output = geometry.output[axis];
  if (axis >= geometry.ndim)
    return input == 1 && kernel == 1 && stride == 1 && padding == 0 && dilation == 1 && output == 1;
  return within(input, 0) && within(kernel, 1) && within(stride, 1) && within(padding, 0) &&
         within(dilation, 1) && within(output, 1) && times(output - 1, stride) <= kLargest &&
         times(kernel - 1, dilation) <= kLargest &&
         times(output - 1, stride) + times(kernel - 1, dilation) < kLargest;
}

bool is_sound(const Geometry& geometry) {
  if (geometry.ndim < 1 || geometry.ndim > kMaxAxes) return false;
  if (!within(geometry.batch, 0) || !within(geometry.in_channels, 0) || !within(geometry.out_channels, 0) ||
      !within(geometry.groups, 1) || !within(geometry.offset_groups, 1))
    return false;
  for (int axis = 0; axis < kMaxAxes; ++axis)
    if (!is_sound(geometry, axis)) return false;
  return divides(geometry.groups, geometry.in_channels) && divides(geometry.groups, geometry.out_channels) &&
         divides(geometry.offset_groups, geometry.in_channels);
}

const void* attribute(const Attributes& attributes, const char* name, int kind) {
  for (int64_t i = 0; i < attributes.count; ++i) {
    const Text& found = *attributes.names[i];
    if (found.length == std::strlen(name) && std::memcmp(found.data, name, found.length) == 0)
      return attributes.kinds[i] == kind ? attributes.values[i] : nullptr;
  }
  return nullptr;
}

bool read_geometry(const Attributes& attributes, Geometry& geometry) {
  const auto* numbers = static_cast<const Numbers*>(attribute(attributes, "geometry", kArrayKind));
  if (!numbers || numbers->element != kS64 || numbers->count * sizeof(int64_t) != sizeof geometry)
    return false;
  std::memcpy(&geometry, numbers->data, sizeof geometry);
  return is_sound(geometry);
}

bool read_set(const Attributes& attributes, const char* name, int64_t& set) {
  const auto* scalar = static_cast<const Scalar*>(attribute(attributes, name, kScalarKind));
  if (!scalar || scalar->element != kS64) return false;
  std::memcpy(&set, scalar->value, sizeof set);
  return set >= 0 && set < int64_t{1} << kRoles;
}

bool has_shape(const Buffer& buffer, const Shape& shape) {
  if (buffer.rank != shape.rank) return false;
  for (int i = 0; i < shape.rank; ++i)
    if (buffer.extents[i] != shape.extents[i]) return false;
  return true;
}

bool is_empty(const Shape& shape) {
  for (int i = 0; i < shape.rank; ++i)
    if (shape.extents[i] == 0) return true;
  return false;
}

// One call, checked. Arrays that are not there are null.
struct Call {
  Geometry geometry;
  int64_t given, needs;
  const Kind* images;
  const Kind* positions;
  void* arguments[kRoles] = {};
  void* results[kRoles] = {};

  const Kind& kind(Role role) const {
    if (role == kOffset || role == kMask) return *positions;
    return role == kWeight || role == kBias ? *kind_of(images->computed == k_float64 ? kF64 : kF32) : *images;
  }

  Array array(void* data) const {  // x or its gradient
    Array array{data_of(data), 0, 0, {}};
    int64_t step = images->bytes;
    for (int64_t axis = geometry.ndim - 1; axis >= 0; --axis) {
      array.axis[axis] = step;
      step *= geometry.input[axis];
    }
    array.channel = step;
    array.batch = step * geometry.in_channels;
    return array;
  }

  Planes planes(Role role, void* data) const {
    if (!data) return {};
    const int64_t bytes = kind(role).bytes;
    int64_t step = bytes;
    for (int64_t axis = 0; axis < geometry.ndim; ++axis) step *= geometry.output[axis];
    return {data_of(data), step * shape_of(geometry, role).extents[1], step, bytes};
  }

 private:
  static char* data_of(void* data) { return static_cast<char*>(data); }
};

Error* take(const CallFrame& frame, const Buffers& buffers, int64_t set, const Call& call, void** data) {
  if (buffers.size < sizeof buffers || buffers.count != __builtin_popcountll(set))
    return refuse(frame, kInvalidArgument, "the number of arrays is not what given and needs say");
  for (int role = 0, next = 0; role < kRoles; ++role) {
    if (!(set & bit(Role(role)))) continue;
    const auto& buffer = *static_cast<const Buffer*>(buffers.values[next]);
    const Shape shape = shape_of(call.geometry, Role(role));
    const Kind& kind = call.kind(Role(role));
    if (buffers.kinds[next++] != kBufferKind || buffer.size < sizeof buffer ||
        buffer.element != kind.element || !has_shape(buffer, shape) || !addressable(shape, kind.bytes) ||
        (!buffer.data && !is_empty(shape)))
      return refuse(frame, kInvalidArgument, " is not the array that the geometry says", kNames[role]);
    data[role] = buffer.data;
  }
  return nullptr;
}

// The dtypes of x and of offset or mask are free to choose; those of the others follow.
Error* choose_kinds(const CallFrame& frame, Call& call) {
  call.images = call.positions = nullptr;
  const Buffers& buffers = frame.arguments;
  for (int role = 0, next = 0; role < kWeight && next < buffers.count; ++role) {
    if (!(call.given & bit(Role(role)))) continue;
    const Kind* kind = kind_of(static_cast<const Buffer*>(buffers.values[next++])->element);
    (role == kX ? call.images : call.positions) = kind;
  }
  if (!call.positions && !(call.given & (bit(kOffset) | bit(kMask)))) call.positions = call.images;
  if (!call.images || !call.positions ||
      (call.positions != call.images &&
       (call.images->storage == Storage::kSame || call.positions->element != kF32)))
    return refuse(frame, kInvalidArgument, "the dtypes are none that is computed");
  return nullptr;
}

Error* read(const CallFrame& frame, int64_t required, Call& call) {
  const Attributes& attributes = frame.attributes;
  if (attributes.size < sizeof attributes || !read_geometry(attributes, call.geometry))
    return refuse(frame, kInvalidArgument, "geometry is not one of this version");
  if (!read_set(attributes, "given", call.given) || !read_set(attributes, "needs", call.needs) ||
      (call.given & required) != required)
    return refuse(frame, kInvalidArgument, "given or needs is no set of arrays of this version");
  if (Error* error = choose_kinds(frame, call)) return error;
  if (Error* error = take(frame, frame.arguments, call.given, call, call.arguments)) return error;
  return take(frame, frame.results, call.needs, call, call.results);
}

// ---- before a call

// Of the versions known here the one that XLA speaks, or else the newest: some XLA accepts its own only, and the
// oldest says nothing of itself yet. Metadata of an unknown size stay as they are, which XLA takes for a refusal.
void describe(const Api* api, Metadata& metadata) {
  if (metadata.size < offsetof(Metadata, traits) + sizeof metadata.traits) return;
  const int minor = api ? api->version.minor : kOldestMinor;
  metadata.version = {sizeof(Version), nullptr, kMajor,
                      minor < kOldestMinor   ? kOldestMinor
                      : minor > kNewestMinor ? kNewestMinor
                                             : minor};
  metadata.traits = 0;
}

Metadata* asked_for_metadata(const CallFrame& frame) {
  for (const Extension* extension = frame.extensions; extension; extension = extension->next)
    if (extension->kind == kMetadataExtension && extension->size >= sizeof(MetadataExtension))
      return reinterpret_cast<const MetadataExtension*>(extension)->metadata;
  return nullptr;
}

bool is_known(const CallFrame& frame) {
  const Version& version = frame.api->version;
  return frame.size >= sizeof frame && version.major == kMajor && version.minor >= kOldestMinor;
}

// Answers the question asked at registration, or hands the call to `compute`.
Error* answer(const CallFrame& frame, int64_t required, Error* (*compute)(const CallFrame&, const Call&)) {
  if (Metadata* metadata = asked_for_metadata(frame)) {
    describe(frame.api, *metadata);
    return nullptr;
  }
  if (!is_known(frame)) return refuse(frame, kUnimplemented, "this version of XLA's interface is unknown");
  if (frame.stage != kExecute) return refuse(frame, kUnimplemented, "called in a stage other than execution");
  Call call;
  if (Error* error = read(frame, required, call)) return error;
  return compute(frame, call);
}

Error* finish(const CallFrame& frame, Status status) {
  if (status == Status::kOk) return nullptr;
  return refuse(frame, kResourceExhausted, "no memory for the workspace of a deformable convolution");
}

// The calling thread is not Python's: nobody asks it about Ctrl-C.
constexpr Interrupt kNever{nullptr, nullptr};

Error* compute_forward(const CallFrame& frame, const Call& call) {
  if (call.needs != bit(kOutput)) return refuse(frame, kInvalidArgument, "needs of a forward is the output");
  const ForwardArguments arguments{
      call.geometry,
      call.images->storage,
      call.positions->storage,
      call.array(call.arguments[kX]),
      call.planes(kOffset, call.arguments[kOffset]),
      call.planes(kMask, call.arguments[kMask]),
      call.arguments[kWeight],
      call.arguments[kBias],
      call.planes(kOutput, call.results[kOutput]),
  };
  return finish(frame, dcn::forward(*isa_kernels(chosen_isa.load()), call.images->computed, arguments,
                                    process_threads(), kNever));
}

Error* compute_backward(const CallFrame& frame, const Call& call) {
  if (call.needs & ~(kGradients & (call.given | bit(kBias))))
    return refuse(frame, kInvalidArgument, "needs of a backward are gradients of what is given");
  const BackwardArguments arguments{
      call.geometry,
      call.images->storage,
      call.positions->storage,
      call.array(call.arguments[kX]),
      call.planes(kOffset, call.arguments[kOffset]),
      call.planes(kMask, call.arguments[kMask]),
      call.planes(kOutput, call.arguments[kOutput]),
      call.arguments[kWeight],
      call.array(call.results[kX]),
      call.planes(kOffset, call.results[kOffset]),
      call.planes(kMask, call.results[kMask]),
      call.results[kWeight],
      call.results[kBias],
  };
  return finish(frame, dcn::backward(*isa_kernels(chosen_isa.load()), call.images->computed, arguments,
                                     process_threads(), kNever));
}

}  // namespace

Error* forward(CallFrame* frame) { return answer(*frame, bit(kX) | bit(kWeight), compute_forward); }

Error* backward(CallFrame* frame) {
  return answer(*frame, bit(kX) | bit(kWeight) | bit(kOutput), compute_backward);
}

void use_isa(int isa) { chosen_isa.store(isa); }

}  // namespace dcn::xla
