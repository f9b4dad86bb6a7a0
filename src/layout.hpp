// Channels-last copies of an image, and results back into the caller's layout.
//
// The kernels read and write pixels whose channels are contiguous. An array that is stored so is used in
// place; any other is transposed, an image at a time, in blocks of one vector by one vector of registers.
#pragma once

#include "arrays.hpp"
#include "halves.hpp"
#include "integers.hpp"
#include "locate.hpp"
#include "vector.hpp"

namespace dcn::DCN_ISA {

// to[column][row] = from[row][column] (+ bias[column]); columns of `from` and rows of `to` are contiguous,
// strides in elements. Blocks of N x N, and for what they leave over blocks half as large.
template <class T, int N = kLanes<T>>
void transpose_matrix(int64_t rows, int64_t columns, const T* from, int64_t from_stride, T* to,
                      int64_t to_stride, const T* bias = nullptr) {
  using V = Vec<T, N>;
  const int64_t whole_rows = rows / N * N, whole_columns = columns / N * N;
  const auto block = [=](int64_t r, int64_t c) __attribute__((always_inline)) {
    V lines[N];
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) lines[i] = load<V>(from + (r + i) * from_stride + c);
    if constexpr (N > 1) transpose<1>(lines);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i)
      store(to + (c + i) * to_stride + r, bias ? lines[i] + broadcast<V>(bias[c + i]) : lines[i]);
  };
  // Along the lines that lie farther apart: each page is then visited once.
  if (from_stride > to_stride) {
    for (int64_t r = 0; r < whole_rows; r += N)
      for (int64_t c = 0; c < whole_columns; c += N) block(r, c);
  } else {
    for (int64_t c = 0; c < whole_columns; c += N)
      for (int64_t r = 0; r < whole_rows; r += N) block(r, c);
  }
  if constexpr (N > 1) {
    if (whole_columns < columns)
      transpose_matrix<T, N / 2>(whole_rows, columns - whole_columns, from + whole_columns, from_stride,
                                 to + whole_columns * to_stride, to_stride,
                                 bias ? bias + whole_columns : nullptr);
    if (whole_rows < rows)
      transpose_matrix<T, N / 2>(rows - whole_rows, columns, from + whole_rows * from_stride, from_stride,
                                 to + whole_rows, to_stride, bias);
  }
}

// Position of a matrix in memory: element (position, channel) lies at position * position_stride + channel *
// channel_stride.
template <class T>
struct MatrixView {
  T* data;
  int64_t position, channel;  // in elements
};

// Copies positions x channels from one matrix to another (+ bias), whatever the strides of each.
template <class T>
void copy_matrix(int64_t positions, int64_t channels, MatrixView<const T> from, MatrixView<T> to,
                 const T* bias = nullptr) {
  if (from.position == 1 && to.channel == 1 && !bias)
    return transpose_matrix<T>(channels, positions, from.data, from.channel, to.data, to.position);
  if (from.channel == 1 && to.position == 1)
    return transpose_matrix<T>(positions, channels, from.data, from.position, to.data, to.channel, bias);
  if (from.channel == 1 && to.channel == 1) {
    for (int64_t p = 0; p < positions; ++p)
      for_each_vector<T>(channels, [&](auto lanes, int64_t c) {
        using V = Vec<T, decltype(lanes)::count>;
        const V value = load<V>(from.data + p * from.position + c);
        store(to.data + p * to.position + c, bias ? value + load<V>(bias + c) : value);
      });
    return;
  }
  for (int64_t p = 0; p < positions; ++p)
    for (int64_t c = 0; c < channels; ++c) {
      const T value = from.data[p * from.position + c * from.channel];
      to.data[p * to.position + c * to.channel] = bias ? value + bias[c] : value;
    }
}

constexpr int64_t kCopyPixels = 256;  // pixels of one item of a copy

// The same from and to an image in a caller's array, whatever it holds there. The image's strides are in bytes; of
// halves there are at most kCopyPixels positions.
template <class T>
struct StoredMatrix {
  char* data;
  int64_t position, channel;  // in bytes
  Storage storage;

  MatrixView<T> same() const {
    constexpr int64_t size = sizeof(T);
    return {reinterpret_cast<T*>(data), position / size, channel / size};
  }

  void copy_to(int64_t positions, int64_t channels, MatrixView<T> to) const {
    if (storage == Storage::kSame) {
      const MatrixView<T> from = same();
      return copy_matrix<T>(positions, channels, {from.data, from.position, from.channel}, to);
    }
    if constexpr (sizeof(T) == sizeof(float))
      with_half(storage, [&](auto half) {
        using Half = decltype(half);
        if (channel == kHalfBytes) {
          for (int64_t p = 0; p < positions; ++p)
            widen_line<Half>(data + p * position, channel, channels, to.data + p * to.position);
          return;
        }
        T lines[kLines][kCopyPixels];
        for (int64_t first = 0; first < channels; first += kLines) {
          const int64_t count = channels - first < kLines ? channels - first : kLines;
          for (int64_t c = 0; c < count; ++c)
            widen_line<Half>(data + (first + c) * channel, position, positions, lines[c]);
          copy_matrix<T>(positions, count, {lines[0], 1, kCopyPixels}, {to.data + first, to.position, 1});
        }
      });
  }

  // Channels of `from` lie side by side.
  void copy_from(int64_t positions, int64_t channels, MatrixView<const T> from,
                 const T* bias = nullptr) const {
    if (storage == Storage::kSame) return copy_matrix<T>(positions, channels, from, same(), bias);
    if constexpr (sizeof(T) == sizeof(float))
      with_half(storage, [&](auto half) {
        using Half = decltype(half);
        T lines[kLines][kCopyPixels];
        if (channel == kHalfBytes) {
          for (int64_t p = 0; p < positions; ++p)
            for (int64_t first = 0; first < channels; first += kCopyPixels) {
              const int64_t count = channels - first < kCopyPixels ? channels - first : kCopyPixels;
              copy_matrix<T>(1, count, {from.data + p * from.position + first, from.position, 1},
                             {lines[0], kCopyPixels, 1}, bias ? bias + first : nullptr);
              narrow_line<Half>(lines[0], count, data + p * position + first * kHalfBytes, kHalfBytes);
            }
          return;
        }
        for (int64_t first = 0; first < channels; first += kLines) {
          const int64_t count = channels - first < kLines ? channels - first : kLines;
          copy_matrix<T>(positions, count, {from.data + first, from.position, 1}, {lines[0], 1, kCopyPixels},
                         bias ? bias + first : nullptr);
          for (int64_t c = 0; c < count; ++c)
            narrow_line<Half>(lines[c], positions, data + (first + c) * channel, position);
        }
      });
  }

 private:
  static constexpr int64_t kLines = 16;
};

// An image seen as rows of pixels at a constant distance: as few and as long as its strides allow.
template <int NDim>
struct Rows {
  int64_t rows, length;
  int64_t outer[NDim];  // extents of the axes that number the rows
  int outer_axes;

  Rows(const int64_t* extents, const int64_t* strides)
      : rows(1), length(extents[NDim - 1]), outer_axes(NDim - 1) {
    while (outer_axes > 0 && strides[outer_axes - 1] == strides[outer_axes] * extents[outer_axes])
      length *= extents[--outer_axes];
    for (int axis = 0; axis < outer_axes; ++axis) rows *= outer[axis] = extents[axis];
  }
  int64_t offset(int64_t row, const int64_t* strides) const {
    int64_t offset = 0;
    for (int axis = outer_axes - 1; axis >= 0; row /= outer[axis--])
      offset += row % outer[axis] * strides[axis];
    return offset;
  }
};

// The distance at which to lay rows of `count` elements: a large power of two would crowd their starts into
// few sets of a cache.
template <class T>
DCN_INLINE int64_t uncrowded(int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(T);
  return count % (16 * kLine) == 0 ? count + kLine : count;
}

// Zeros for pixels first to end, in the order of the axes, with `channels` channels each.
template <class T, int NDim>
void clear_pixels(const Pixels<NDim>& view, const int64_t* extents, int64_t first, int64_t end,
                  int64_t channels) {
  for (int64_t pixel = first; pixel < end; ++pixel) {
    char* at = view.data;
    for (int64_t axis = NDim - 1, rest = pixel; axis >= 0; rest /= extents[axis--])
      at += rest % extents[axis] * view.axis[axis];
    __builtin_memset(at, 0, channels * sizeof(T));
  }
}

// How the kernels reach the pixels of an array of images: in place where channels are contiguous and numbers of the
// kernel's type, else through a channels-last buffer of one image. The buffer holds parts of the channels one after the
// other, [part][pixel][channel], as the pass takes them: a thread that works on a part then touches few pages and whole
// lines.
template <class T, int NDim>
struct Images {
  Array array;
  Storage storage;
  int64_t channels, extents[NDim], pixels;
  bool in_place;

  Images(const Array& array, Storage storage, int64_t channels, const int64_t* extents)
      : array(array), storage(storage), channels(channels), pixels(1) {
    for (int axis = 0; axis < NDim; ++axis) pixels *= this->extents[axis] = extents[axis];
    in_place = storage == Storage::kSame && (channels <= 1 || array.channel == sizeof(T));
  }

  // From pixel to pixel of a part; several parts share the buffer without gaps.
  int64_t stride(int64_t count) const { return count == channels ? uncrowded<T>(count) : count; }
  size_t buffer_elements() const { return in_place ? 0 : static_cast<size_t>(pixels) * stride(channels); }

  Pixels<NDim> view(int64_t image, T* buffer, int64_t first, int64_t count) const {
    if (in_place) {
      Pixels<NDim> view = {array.data + image * array.batch + first * static_cast<int64_t>(sizeof(T)), {}};
      for (int axis = 0; axis < NDim; ++axis) view.axis[axis] = array.axis[axis];
      return view;
    }
    Pixels<NDim> view = {reinterpret_cast<char*>(buffer + first * pixels), {}};
    for (int64_t axis = NDim - 1, step = stride(count) * sizeof(T); axis >= 0; step *= extents[axis--])
      view.axis[axis] = step;
    return view;
  }

  // Copies are cut into items of some pixels, each with all channels of a part.
  int64_t copy_items() const {
    if (in_place || pixels == 0) return 0;
    const Rows<NDim> rows(extents, array.axis);
    return rows.rows * ceiling(rows.length, kCopyPixels);
  }
  // As many as there can be, whatever the strides.
  int64_t most_copy_items() const {
    const int64_t length = extents[NDim - 1];
    return in_place || pixels == 0 ? 0 : pixels / length * ceiling(length, kCopyPixels);
  }
  // The item with a pixel, numbered in the order of the axes.
  int64_t copy_item(int64_t pixel) const {
    const Rows<NDim> rows(extents, array.axis);
    return pixel / rows.length * ceiling(rows.length, kCopyPixels) + pixel % rows.length / kCopyPixels;
  }
  void copy_in(int64_t image, int64_t item, T* buffer, int64_t first, int64_t count) const {
    with_item(image, item, first, [&](int64_t pixel, int64_t pixels, const StoredMatrix<T>& stored) {
      stored.copy_to(pixels, count, matrix(buffer, pixel, first, count));
    });
  }
  void copy_out(int64_t image, int64_t item, T* buffer, int64_t first, int64_t count) const {
    with_item(image, item, first, [&](int64_t pixel, int64_t pixels, const StoredMatrix<T>& stored) {
      const MatrixView<T> from = matrix(buffer, pixel, first, count);
      stored.copy_from(pixels, count, {from.data, from.position, from.channel});
    });
  }

 private:
  MatrixView<T> matrix(T* buffer, int64_t pixel, int64_t first, int64_t count) const {
    return {buffer + first * pixels + pixel * stride(count), stride(count), 1};
  }
  template <class Body>
  void with_item(int64_t image, int64_t item, int64_t channel, const Body& body) const {
    const Rows<NDim> rows(extents, array.axis);
    const int64_t items = ceiling(rows.length, kCopyPixels);
    const int64_t row = item / items, start = item % items * kCopyPixels;
    const int64_t count = rows.length - start < kCopyPixels ? rows.length - start : kCopyPixels;
    char* data = array.data + image * array.batch + channel * array.channel + rows.offset(row, array.axis) +
                 start * array.axis[NDim - 1];
    body(row * rows.length + start, count,
         StoredMatrix<T>{data, array.axis[NDim - 1], array.channel, storage});
  }
};

}  // namespace dcn::DCN_ISA
