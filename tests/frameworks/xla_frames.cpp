// Our declarations of XLA's interface against its own header, and calls of a handler with frames that the header
// defines: test_xla_abi.py compiles this.
#include <xla/ffi/api/c_api.h>

#include <cstring>

#include "xla_abi.hpp"

namespace ours = dcn::xla;

#define SAME_PLACE(theirs, their_member, our, our_member)                          \
  static_assert(offsetof(theirs, their_member) == offsetof(ours::our, our_member), \
                #theirs "." #their_member);                                        \
  static_assert(sizeof(theirs::their_member) == sizeof(ours::our::our_member), #theirs "." #their_member)
// A struct that XLA may hand over with more behind it than we read.
#define AT_LEAST(theirs, our) static_assert(sizeof(ours::our) <= sizeof(theirs), #theirs)
#define SAME_SIZE(theirs, our) static_assert(sizeof(ours::our) == sizeof(theirs), #theirs)
#define SAME_NUMBER(theirs, our) \
  static_assert(static_cast<int>(theirs) == static_cast<int>(ours::our), #theirs)

SAME_SIZE(XLA_FFI_Extension_Base, Extension);
SAME_PLACE(XLA_FFI_Extension_Base, struct_size, Extension, size);
SAME_PLACE(XLA_FFI_Extension_Base, type, Extension, kind);
SAME_PLACE(XLA_FFI_Extension_Base, next, Extension, next);

SAME_SIZE(XLA_FFI_Api_Version, Version);
SAME_PLACE(XLA_FFI_Api_Version, struct_size, Version, size);
SAME_PLACE(XLA_FFI_Api_Version, extension_start, Version, extensions);
SAME_PLACE(XLA_FFI_Api_Version, major_version, Version, major);
SAME_PLACE(XLA_FFI_Api_Version, minor_version, Version, minor);

SAME_SIZE(XLA_FFI_Error_Create_Args, ErrorRequest);
SAME_PLACE(XLA_FFI_Error_Create_Args, struct_size, ErrorRequest, size);
SAME_PLACE(XLA_FFI_Error_Create_Args, extension_start, ErrorRequest, extensions);
SAME_PLACE(XLA_FFI_Error_Create_Args, message, ErrorRequest, message);
SAME_PLACE(XLA_FFI_Error_Create_Args, errc, ErrorRequest, code);

AT_LEAST(XLA_FFI_Api, Api);
SAME_PLACE(XLA_FFI_Api, struct_size, Api, size);
SAME_PLACE(XLA_FFI_Api, extension_start, Api, extensions);
SAME_PLACE(XLA_FFI_Api, api_version, Api, version);
SAME_PLACE(XLA_FFI_Api, internal_api, Api, internal);
SAME_PLACE(XLA_FFI_Api, XLA_FFI_Error_Create, Api, create_error);

AT_LEAST(XLA_FFI_Metadata, Metadata);
SAME_PLACE(XLA_FFI_Metadata, struct_size, Metadata, size);
SAME_PLACE(XLA_FFI_Metadata, api_version, Metadata, version);
SAME_PLACE(XLA_FFI_Metadata, traits, Metadata, traits);

SAME_SIZE(XLA_FFI_Metadata_Extension, MetadataExtension);
SAME_PLACE(XLA_FFI_Metadata_Extension, extension_base, MetadataExtension, base);
SAME_PLACE(XLA_FFI_Metadata_Extension, metadata, MetadataExtension, metadata);

SAME_SIZE(XLA_FFI_Buffer, Buffer);
SAME_PLACE(XLA_FFI_Buffer, struct_size, Buffer, size);
SAME_PLACE(XLA_FFI_Buffer, extension_start, Buffer, extensions);
SAME_PLACE(XLA_FFI_Buffer, dtype, Buffer, element);
SAME_PLACE(XLA_FFI_Buffer, data, Buffer, data);
SAME_PLACE(XLA_FFI_Buffer, rank, Buffer, rank);
SAME_PLACE(XLA_FFI_Buffer, dims, Buffer, extents);

SAME_SIZE(XLA_FFI_Args, Buffers);
SAME_PLACE(XLA_FFI_Args, struct_size, Buffers, size);
SAME_PLACE(XLA_FFI_Args, extension_start, Buffers, extensions);
SAME_PLACE(XLA_FFI_Args, size, Buffers, count);
SAME_PLACE(XLA_FFI_Args, types, Buffers, kinds);
SAME_PLACE(XLA_FFI_Args, args, Buffers, values);

SAME_SIZE(XLA_FFI_Rets, Buffers);
SAME_PLACE(XLA_FFI_Rets, struct_size, Buffers, size);
SAME_PLACE(XLA_FFI_Rets, extension_start, Buffers, extensions);
SAME_PLACE(XLA_FFI_Rets, size, Buffers, count);
SAME_PLACE(XLA_FFI_Rets, types, Buffers, kinds);
SAME_PLACE(XLA_FFI_Rets, rets, Buffers, values);

SAME_SIZE(XLA_FFI_ByteSpan, Text);
SAME_PLACE(XLA_FFI_ByteSpan, ptr, Text, data);
SAME_PLACE(XLA_FFI_ByteSpan, len, Text, length);

SAME_SIZE(XLA_FFI_Scalar, Scalar);
SAME_PLACE(XLA_FFI_Scalar, dtype, Scalar, element);
SAME_PLACE(XLA_FFI_Scalar, value, Scalar, value);

SAME_SIZE(XLA_FFI_Array, Numbers);
SAME_PLACE(XLA_FFI_Array, dtype, Numbers, element);
SAME_PLACE(XLA_FFI_Array, size, Numbers, count);
SAME_PLACE(XLA_FFI_Array, data, Numbers, data);

SAME_SIZE(XLA_FFI_Attrs, Attributes);
SAME_PLACE(XLA_FFI_Attrs, struct_size, Attributes, size);
SAME_PLACE(XLA_FFI_Attrs, extension_start, Attributes, extensions);
SAME_PLACE(XLA_FFI_Attrs, size, Attributes, count);
SAME_PLACE(XLA_FFI_Attrs, types, Attributes, kinds);
SAME_PLACE(XLA_FFI_Attrs, names, Attributes, names);
SAME_PLACE(XLA_FFI_Attrs, attrs, Attributes, values);

AT_LEAST(XLA_FFI_CallFrame, CallFrame);
SAME_PLACE(XLA_FFI_CallFrame, struct_size, CallFrame, size);
SAME_PLACE(XLA_FFI_CallFrame, extension_start, CallFrame, extensions);
SAME_PLACE(XLA_FFI_CallFrame, api, CallFrame, api);
SAME_PLACE(XLA_FFI_CallFrame, ctx, CallFrame, context);
SAME_PLACE(XLA_FFI_CallFrame, stage, CallFrame, stage);
SAME_PLACE(XLA_FFI_CallFrame, args, CallFrame, arguments);
SAME_PLACE(XLA_FFI_CallFrame, rets, CallFrame, results);
SAME_PLACE(XLA_FFI_CallFrame, attrs, CallFrame, attributes);
static_assert(XLA_FFI_CallFrame_STRUCT_SIZE >= sizeof(ours::CallFrame), "the size that XLA states");

SAME_NUMBER(XLA_FFI_Extension_Metadata, kMetadataExtension);
SAME_NUMBER(XLA_FFI_ArgType_BUFFER, kBufferKind);
SAME_NUMBER(XLA_FFI_RetType_BUFFER, kBufferKind);
SAME_NUMBER(XLA_FFI_AttrType_ARRAY, kArrayKind);
SAME_NUMBER(XLA_FFI_AttrType_SCALAR, kScalarKind);
SAME_NUMBER(XLA_FFI_ExecutionStage_EXECUTE, kExecute);
SAME_NUMBER(XLA_FFI_DataType_S64, kS64);
SAME_NUMBER(XLA_FFI_DataType_F16, kF16);
SAME_NUMBER(XLA_FFI_DataType_F32, kF32);
SAME_NUMBER(XLA_FFI_DataType_F64, kF64);
SAME_NUMBER(XLA_FFI_DataType_BF16, kBF16);
SAME_NUMBER(XLA_FFI_Error_Code_INVALID_ARGUMENT, kInvalidArgument);
SAME_NUMBER(XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, kResourceExhausted);
SAME_NUMBER(XLA_FFI_Error_Code_UNIMPLEMENTED, kUnimplemented);
static_assert(XLA_FFI_API_MAJOR == ours::kMajor, "another interface");
// A newer minor version is read as the newest known: what was appended is not looked at.

// ---- calls

struct XLA_FFI_Error {
  int code;
  char message[256];
};

namespace {

XLA_FFI_Error last;

XLA_FFI_Error* create_error(XLA_FFI_Error_Create_Args* request) {
  last.code = request->errc;
  std::strncpy(last.message, request->message, sizeof last.message - 1);
  return &last;
}

XLA_FFI_Api api_of(int major, int minor) {
  XLA_FFI_Api api{};
  api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
  api.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, major, minor};
  api.XLA_FFI_Error_Create = create_error;
  return api;
}

constexpr int kMost = 8;

}  // namespace

extern "C" {

// An array or an attribute of numbers; `name` is for attributes, and a `rank` of -1 makes a scalar of one.
struct Value {
  const char* name;
  int dtype;
  void* data;
  int64_t rank;
  int64_t* extents;
  int kind;
};

struct Frame {
  size_t size_lacking;  // from the sizes that structs state
  int major, minor, stage;
  int64_t arguments, results, attributes;
  Value* values;  // arguments, results, attributes
};

// Returns the error's code, 0 for none.
int call_handler(XLA_FFI_Handler* handler, const Frame* given, const char** message) {
  const XLA_FFI_Api api = api_of(given->major, given->minor);
  XLA_FFI_Buffer buffers[2 * kMost];
  void* pointers[2 * kMost];
  int kinds[3 * kMost];
  XLA_FFI_Array arrays[kMost];
  XLA_FFI_Scalar scalars[kMost];
  XLA_FFI_ByteSpan names[kMost];
  XLA_FFI_ByteSpan* name_pointers[kMost];
  void* attributes[kMost];
  const int64_t count = given->arguments + given->results;
  for (int64_t i = 0; i < count; ++i) {
    const Value& value = given->values[i];
    buffers[i] = {XLA_FFI_Buffer_STRUCT_SIZE,
                  nullptr,
                  static_cast<XLA_FFI_DataType>(value.dtype),
                  value.data,
                  value.rank,
                  value.extents};
    pointers[i] = &buffers[i];
    kinds[i] = value.kind;
  }
  for (int64_t i = 0; i < given->attributes; ++i) {
    const Value& value = given->values[count + i];
    const auto dtype = static_cast<XLA_FFI_DataType>(value.dtype);
    names[i] = {value.name, std::strlen(value.name)};
    name_pointers[i] = &names[i];
    scalars[i] = {dtype, value.data};
    if (value.rank >= 0) arrays[i] = {dtype, static_cast<size_t>(value.extents[0]), value.data};
    attributes[i] = value.rank < 0 ? static_cast<void*>(&scalars[i]) : &arrays[i];
    kinds[count + i] = value.kind;
  }
  XLA_FFI_CallFrame frame{};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE - given->size_lacking;
  frame.api = &api;
  frame.stage = static_cast<XLA_FFI_ExecutionStage>(given->stage);
  frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, given->arguments,
                reinterpret_cast<XLA_FFI_ArgType*>(kinds), pointers};
  frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, given->results,
                reinterpret_cast<XLA_FFI_RetType*>(kinds + given->arguments), pointers + given->arguments};
  frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE,
                 nullptr,
                 given->attributes,
                 reinterpret_cast<XLA_FFI_AttrType*>(kinds + count),
                 name_pointers,
                 attributes};
  last = {};
  const XLA_FFI_Error* error = handler(&frame);
  *message = last.message;
  return error ? error->code : 0;
}

// Asks what XLA asks at registration; with a negative `minor`, without telling a version. Returns 1000 * major +
// minor of the answer, or -1 where there is none.
int ask_version(XLA_FFI_Handler* handler, int minor, size_t size_lacking) {
  const XLA_FFI_Api api = api_of(0, minor);
  XLA_FFI_Metadata metadata{};
  metadata.struct_size = XLA_FFI_Metadata_STRUCT_SIZE - size_lacking;
  metadata.api_version.major_version = -1;
  metadata.traits = 77;
  XLA_FFI_Extension_Base other{XLA_FFI_Extension_Base_STRUCT_SIZE, static_cast<XLA_FFI_Extension_Type>(99),
                               nullptr};
  XLA_FFI_Metadata_Extension extension{
      {XLA_FFI_Metadata_Extension_STRUCT_SIZE, XLA_FFI_Extension_Metadata, nullptr}, &metadata};
  other.next = &extension.extension_base;
  XLA_FFI_CallFrame frame{};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.extension_start = &other;
  frame.api = minor < 0 ? nullptr : &api;
  frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
  if (handler(&frame)) return -2;
  if (metadata.api_version.major_version < 0) return -1;
  return metadata.traits == 0 ? 1000 * metadata.api_version.major_version + metadata.api_version.minor_version
                              : -3;
}

// A handler that remembers where the arrays of its last call were, and passes it on.
XLA_FFI_Handler* spied_on = nullptr;
void* seen[2 * kMost];

void spy_on(XLA_FFI_Handler* handler) { spied_on = handler; }
void* const* seen_pointers() { return seen; }

XLA_FFI_Error* spy(XLA_FFI_CallFrame* frame) {
  if (!frame->extension_start) {
    int next = 0;
    for (int64_t i = 0; i < frame->args.size; ++i)
      seen[next++] = static_cast<XLA_FFI_Buffer*>(frame->args.args[i])->data;
    for (int64_t i = 0; i < frame->rets.size; ++i)
      seen[next++] = static_cast<XLA_FFI_Buffer*>(frame->rets.rets[i])->data;
  }
  return spied_on(frame);
}
}
