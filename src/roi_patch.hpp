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
  bool plain;      // every line has a weight and a slope

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
    finish();
  }

 private:
  void finish() {
    weighs = false;
    plain = true;
    for (int64_t i = 0; i < count; ++i) {
      line[i].weight = static_cast<T>(sums[0][i]);
      line[i].slope = static_cast<T>(sums[1][i]);
      weighs |= line[i].weight != 0;
      plain &= line[i].weight != 0 && line[i].slope != 0;
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

// Calls body(lanes, vectors, channel) for blocks of kWide vectors of channels, then for the rest.
template <class T, int kWide, class Body>
DCN_INLINE void for_each_block_of_vectors(int64_t channels, const Body& body) {
  int64_t c = 0;
  for (; c + kWide * kLanes<T> <= channels; c += kWide * kLanes<T>)
    body(Lanes<kLanes<T>>{}, Lanes<kWide>{}, c);
  for_each_vector<T>(channels - c, [&](auto lanes, int64_t rest) { body(lanes, Lanes<1>{}, c + rest); });
}

// to[channel] = (sum over the patch of weights * x) * inverse * mask. All lines weigh something.
template <class T>
void average_patch(const Lines<T>& rows, const Lines<T>& columns, const Pixels<2>& x, int64_t channels,
                   T inverse, T mask, T* to) {
  for_each_block_of_vectors<T, 4>(channels, [&](auto lanes, auto vectors,
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

// dots[0..2] = <gradient, sum over the patch of w * x>, w being the weights, the weights with slopes for rows,
// and with slopes for columns. A line whose factor is 0 is left out (0 * Inf would be NaN); with kPlain no
// factor is.
//
// This and scatter_patch are functions of their own, whatever gradients are asked for: the compiler fuses
// products with additions as the code around lets it, and bits must not depend on that.
template <class T, bool kPlain>
[[gnu::noinline]] void dot_patch(const Lines<T>& rows, const Lines<T>& columns, const Pixels<2>& x,
                                 int64_t channels, const T* gradient, T* dots) {
  const auto step = [&](auto lanes, auto vectors, int64_t c,
                        auto(&products)[4]) __attribute__((always_inline)) {
    constexpr int n = decltype(vectors)::count, width = decltype(lanes)::count;
    using V = Vec<T, width>;
    V totals[3][n] = {};
    for_each_piece(rows.count, columns.count, [&](int64_t r, int64_t last_row, int64_t first, int64_t last) {
      V pieces[3][n] = {};
      for (; r < last_row; ++r) {
        const Line<T>& row = rows.line[r];
        const char* line = x.data + row.index * x.axis[0] + c * static_cast<int64_t>(sizeof(T));
        V weighed[n] = {}, moved[n] = {};
        for (int64_t i = first; i < last; ++i) {
          const Line<T>& column = columns.line[i];
          const T* pixel = reinterpret_cast<const T*>(line + column.index * x.axis[1]);
          const V weight = broadcast<V>(column.weight), slope = broadcast<V>(column.slope);
#pragma GCC unroll 2
          for (int k = 0; k < n; ++k) {
            const V value = load<V>(pixel + k * width);
            if (kPlain || column.weight != 0) weighed[k] += weight * value;
            if (kPlain || column.slope != 0) moved[k] += slope * value;
          }
        }
        const V weight = broadcast<V>(row.weight), slope = broadcast<V>(row.slope);
#pragma GCC unroll 2
        for (int k = 0; k < n; ++k) {
          if (kPlain || row.weight != 0) pieces[0][k] += weight * weighed[k];
          if (kPlain || row.slope != 0) pieces[1][k] += slope * weighed[k];
          if (kPlain || row.weight != 0) pieces[2][k] += weight * moved[k];
        }
      }
#pragma GCC unroll 3
      for (int j = 0; j < 3; ++j)
#pragma GCC unroll 2
        for (int k = 0; k < n; ++k) totals[j][k] += pieces[j][k];
    });
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j)
#pragma GCC unroll 2
      for (int k = 0; k < n; ++k) products[j] += load<V>(gradient + c + k * width) * totals[j][k];
  };
  constexpr int whole = kLanes<T>;
  Vec<T, 4> total = {};
  int64_t done = 0;
  if (channels >= whole) {
    Vec<T, whole> products[4] = {};
    for (; done + 2 * whole <= channels; done += 2 * whole) step(Lanes<whole>{}, Lanes<2>{}, done, products);
    for (; done + whole <= channels; done += whole) step(Lanes<whole>{}, Lanes<1>{}, done, products);
    total = sums<T, whole, 4>(products);
  }
  for_each_vector<T, (whole > 1 ? whole / 2 : 1)>(channels - done, [&](auto lanes, int64_t c) {
    constexpr int some = decltype(lanes)::count;
    Vec<T, some> products[4] = {};
    step(lanes, Lanes<1>{}, done + c, products);
    total += sums<T, some, 4>(products);
  });
  store(dots, total);
}

// grad_x += gradient * factor * weights, over the patch.
template <class T>
[[gnu::noinline]] void scatter_patch(const Lines<T>& rows, const Lines<T>& columns, const Pixels<2>& grad_x,
                                     int64_t channels, const T* gradient, T factor) {
  for_each_block_of_vectors<T, 2>(
      channels, [&](auto lanes, auto vectors, int64_t c) __attribute__((always_inline)) {
        constexpr int n = decltype(vectors)::count, width = decltype(lanes)::count;
        using V = Vec<T, width>;
        for (int64_t r = 0; r < rows.count; ++r) {
          const Line<T>& row = rows.line[r];
          if (row.weight == 0) continue;
          char* line = grad_x.data + row.index * grad_x.axis[0] + c * static_cast<int64_t>(sizeof(T));
          V part[n];
#pragma GCC unroll 2
          for (int k = 0; k < n; ++k)
            part[k] = load<V>(gradient + c + k * width) * broadcast<V>(factor * row.weight);
          for (int64_t i = 0; i < columns.count; ++i) {
            const Line<T>& column = columns.line[i];
            if (column.weight == 0) continue;
            T* pixel = reinterpret_cast<T*>(line + column.index * grad_x.axis[1]);
            const V weight = broadcast<V>(column.weight);
#pragma GCC unroll 2
            for (int k = 0; k < n; ++k)
              store(pixel + k * width, load<V>(pixel + k * width) + part[k] * weight);
          }
        }
      });
}

}  // namespace dcn::DCN_ISA
