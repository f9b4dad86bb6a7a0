// The part that we use of XLA's foreign function interface, a C ABI: written down from its published facts, so
// that nothing of XLA is needed to compile. tests/frameworks/test_xla_abi.py compares every size and offset with
// the header that jaxlib brings. Versions 0.1 to 0.3 are known; XLA only appends to structs within a major
// version, and every struct begins with its size.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dcn::xla {

constexpr int kMajor = 0, kOldestMinor = 1, kNewestMinor = 3;

struct Error;  // XLA's own

enum Code : int { kInvalidArgument = 3, kResourceExhausted = 8, kUnimplemented = 12, kInternal = 13 };

enum Element : int { kS64 = 5, kF16 = 10, kF32 = 11, kF64 = 12, kBF16 = 16 };

constexpr int kMetadataExtension = 1;
constexpr int kBufferKind = 1;                  // of an argument or result
constexpr int kArrayKind = 1, kScalarKind = 3;  // of an attribute
constexpr int kExecute = 3;                     // the stage of a call

struct Extension {
  size_t size;
  int kind;
  Extension* next;
};

struct Version {
  size_t size;
  Extension* extensions;
  int major;
  int minor;
};

struct ErrorRequest {
  size_t size;
  Extension* extensions;
  const char* message;  // copied
  Code code;
};

struct Api {
  size_t size;
  Extension* extensions;
  Version version;
  const void* internal;
  Error* (*create_error)(ErrorRequest*);
  // More functions follow.
};

struct Metadata {
  size_t size;
  Version version;
  uint32_t traits;
  // The type of a state follows, zero where there is none.
};

struct MetadataExtension {
  Extension base;
  Metadata* metadata;
};

struct Buffer {
  size_t size;
  Extension* extensions;
  Element element;
  void* data;
  int64_t rank;
  int64_t* extents;
};

struct Buffers {  // arguments or results
  size_t size;
  Extension* extensions;
  int64_t count;
  int* kinds;
  void** values;
};

struct Text {
  const char* data;
  size_t length;
};

struct Scalar {
  Element element;
  void* value;
};

struct Numbers {
  Element element;
  size_t count;
  void* data;
};

struct Attributes {
  size_t size;
  Extension* extensions;
  int64_t count;
  int* kinds;
  Text** names;
  void** values;  // Scalar or Numbers, by kind
};

struct CallFrame {
  size_t size;
  Extension* extensions;
  const Api* api;
  void* context;
  int stage;
  Buffers arguments;
  Buffers results;
  Attributes attributes;
  // The future of an asynchronous call follows.
};

}  // namespace dcn::xla
