// The pixels that a bin averages, and what is done with them.
//
// The samples of a bin form a grid, so their weights are those of rows times those of columns: a patch. Its
// lines are rows or columns of pixels, each once, however many samples share it.
#pragma once

#include "layout.hpp"
#include "matmul.hpp"
#include "roi_sampling.hpp"

namespace dcn::DCN_ISA {

template <class T>
struct Line {
  int64_t index;  // of the row or column of x
  T weight;       // sum over the samples of the weight of this line
  T slope;        // sum over the samples of the derivative of that weight by the coordinate
};

template <class T>
struct Lines {
  Line<T>* line;    // ascending; room for every line of x
  double* sums[2];  // the same numbers while they are summed
  int64_t count;
  double samples;  // what the axis contributes to the number of samples of the average
  bool weighs;     // a line has a weight
  bool plain;      // every line has a weight and, where they were asked for, a slope

  // Ascending samples touch no line but the last two again.
  DCN_INLINE int64_t line_of(int64_t index) {
    for (int64_t i = count - 1; i >= 0 && i >= count - 2; --i)
      if (line[i].index == index) return i;
    line[count].index = index;
    sums[0][count] = sums[1][count] = 0;
    return count++;
  }

  // Lines that only a derivative sees are left out unless kSlopes.
  template <bool kSlopes>
  void find(const RoIAxis& axis, double base) {
    count = 0;
    int64_t inside = 0;
    const RoISpan span = roi_span(axis, base);
    for (int64_t i = 0; i < span.count; ++i) {
      const int64_t k = axis.step < 0 ? span.count - 1 - i : i;
      const RoISample sample = roi_sample(axis, axis.coordinate(base, span.first + static_cast<double>(k)));
      if (!sample.inside) continue;
      ++inside;
      const bool moves = kSlopes && sample.moves;
      const int64_t low = line_of(sample.low);
      sums[0][low] += 1 - sample.fraction;
      if (moves) sums[1][low] -= 1;
      if (sample.fraction == 0 && !moves) continue;
      const int64_t high = line_of(sample.low + 1);
      sums[0][high] += sample.fraction;
      if (moves) sums[1][high] += 1;
    }
    samples = axis.counts_all ? axis.samples : static_cast<double>(inside);
    finish(kSlopes);
  }

 private:
  void finish(bool slopes) {
    weighs = false;
    plain = true;
    for (int64_t i = 0; i < count; ++i) {
      line[i].weight = static_cast<T>(sums[0][i]);
      line[i].slope = static_cast<T>(sums[1][i]);
      weighs |= line[i].weight != 0;
      plain &= line[i].weight != 0 && (line[i].slope != 0 || !slopes);
    }
  }
};

// Blocks of at most kPiece x kPiece pixels: sums are taken in pieces, each from zero (docs/semantics.md, rule
// 8).
template <class Body>
DCN_INLINE void for_each_piece(int64_t rows, int64_t columns, const Body& body) {
  for (int64_t row = 0; row < rows; row += kPiece)
    for (int64_t column = 0; column < columns; column += kPiece)
      body(row, row + kPiece < rows ? row + kPiece : rows, column,
           column + kPiece < columns ? column + kPiece : columns);
}

// Calls body(lanes, vectors, channel) for blocks of several vectors of channels, then for what they leave
// over.
template <class T, class Body>
DCN_INLINE void for_each_block_of_vectors(int64_t channels, const Body& body) {
  constexpr int kWide = 4;
  int64_t c = 0;
  for (; c + kWide * kLanes<T> <= channels; c += kWide * kLanes<T>)
    body(Lanes<kLanes<T>>{}, Lanes<kWide>{}, c);
  for_each_vector<T>(channels - c, [&](auto lanes, int64_t rest) { body(lanes, Lanes<1>{}, c + rest); });
}

// to[channel] = (sum over the patch of weights * x) * inverse * mask. All lines weigh something.
template <class T>
void average_patch(const Lines<T>& rows, const Lines<T>& columns, const Pixels<2>& x, int64_t channels,
                   T inverse, T mask, T* to) {
  for_each_block_of_vectors<T>(channels, [&](auto lanes, auto vectors,
                                             int64_t c) __attribute__((always_inline)) {
    constexpr int n = decltype(vectors)::count, width = decltype(lanes)::count;
    using V = Vec<T, width>;
    V total[n] = {};
    for_each_piece(rows.count, columns.count, [&](int64_t r, int64_t last_row, int64_t first, int64_t last) {
      V piece[n] = {};
      for (; r < last_row; ++r) {
        const char* row = x.data + rows.line[r].index * x.axis[0] + c * static_cast<int64_t>(sizeof(T));
        V sum[n] = {};
        for (int64_t i = first; i < last; ++i) {
          const T* pixel = reinterpret_cast<const T*>(row + columns.line[i].index * x.axis[1]);
          const V weight = broadcast<V>(columns.line[i].weight);
#pragma GCC unroll 4
          for (int k = 0; k < n; ++k) sum[k] += weight * load<V>(pixel + k * width);
        }
        const V weight = broadcast<V>(rows.line[r].weight);
#pragma GCC unroll 4
        for (int k = 0; k < n; ++k) piece[k] += weight * sum[k];
      }
#pragma GCC unroll 4
      for (int k = 0; k < n; ++k) total[k] += piece[k];
    });
#pragma GCC unroll 4
    for (int k = 0; k < n; ++k)
      store(to + c + k * width, total[k] * broadcast<V>(inverse) * broadcast<V>(mask));
  });
}

// What a bin's gradient does to its patch, over some channels:
//
//     dots[0..2] = <gradient, sum over the patch of w * x>, w the weights, with slopes for rows, for columns
//     grad_x    += gradient * factor * weights
//
// A line whose factor is 0 is left out (0 * Inf would be NaN). With kPlain no factor is.
template <class T, bool kDots, bool kScatter, bool kPlain>
void visit_patch(const Lines<T>& rows, const Lines<T>& columns, const Pixels<2>& x, const Pixels<2>& grad_x,
                 int64_t channels, const T* gradient, T factor, T* dots) {
  const auto step = [&](auto lanes, int64_t c, auto(&products)[4]) __attribute__((always_inline)) {
    using V = Vec<T, decltype(lanes)::count>;
    const int64_t at = c * static_cast<int64_t>(sizeof(T));
    const V g = load<V>(gradient + c);
    V value = {}, along_rows = {}, along_columns = {};
    for_each_piece(rows.count, columns.count, [&](int64_t r, int64_t last_row, int64_t first, int64_t last) {
      V pieces[3] = {};
      for (; r < last_row; ++r) {
        const Line<T>& row = rows.line[r];
        const bool weighs = kPlain || row.weight != 0, moves = kPlain || row.slope != 0;
        if constexpr (kDots) {
          const char* line = x.data + row.index * x.axis[0] + at;
          V weighed = {}, moved = {};
          for (int64_t i = first; i < last; ++i) {
            const Line<T>& column = columns.line[i];
            const V pixel = load<V>(reinterpret_cast<const T*>(line + column.index * x.axis[1]));
            if (kPlain || column.weight != 0) weighed += broadcast<V>(column.weight) * pixel;
            if (kPlain || column.slope != 0) moved += broadcast<V>(column.slope) * pixel;
          }
          if (weighs) pieces[0] += broadcast<V>(row.weight) * weighed;
          if (moves) pieces[1] += broadcast<V>(row.slope) * weighed;
          if (weighs) pieces[2] += broadcast<V>(row.weight) * moved;
        }
        if constexpr (kScatter) {
          if (!weighs) continue;
          char* line = grad_x.data + row.index * grad_x.axis[0] + at;
          const V part = g * broadcast<V>(factor * row.weight);
          for (int64_t i = first; i < last; ++i) {
            const Line<T>& column = columns.line[i];
            if (!kPlain && column.weight == 0) continue;
            T* pixel = reinterpret_cast<T*>(line + column.index * grad_x.axis[1]);
            store(pixel, load<V>(pixel) + part * broadcast<V>(column.weight));
          }
        }
      }
      value += pieces[0];
      along_rows += pieces[1];
      along_columns += pieces[2];
    });
    if constexpr (kDots) {
      products[0] += g * value;
      products[1] += g * along_rows;
      products[2] += g * along_columns;
    }
  };
  constexpr int whole = kLanes<T>;
  Vec<T, 4> total = {};
  int64_t done = 0;
  if (channels >= whole) {
    Vec<T, whole> products[4] = {};
    for (; done + whole <= channels; done += whole) step(Lanes<whole>{}, done, products);
    if constexpr (kDots) total = sums<T, whole, 4>(products);
  }
  for_each_vector<T, (whole > 1 ? whole / 2 : 1)>(channels - done, [&](auto lanes, int64_t c) {
    constexpr int some = decltype(lanes)::count;
    Vec<T, some> products[4] = {};
    step(lanes, done + c, products);
    if constexpr (kDots) total += sums<T, some, 4>(products);
  });
  if constexpr (kDots) store(dots, total);
}

}  // namespace dcn::DCN_ISA
