// The pixels that a bin averages, and what is done with them.
//
// The samples of a bin form a grid, so their weights are those of rows times those of columns: a patch. Its
// lines are rows or columns of pixels, each once, however many samples share it.
#pragma once

#include "layout.hpp"
#include "matmul.hpp"
#include "roi_sampling.hpp"

namespace dcn::DCN_ISA {

constexpr int kBlockVectors = 2;  // of channels that the backward takes at a time
constexpr int kDotsPerBin = 4;    // three are used: a vector of four is what sums() gives

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
    for (int64_t i = 0; i < count; ++i) {
      line[i].weight = static_cast<T>(sums[0][i]);
      line[i].slope = static_cast<T>(sums[1][i]);
      weighs |= line[i].weight != 0;
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

// A bin as it was located, for all blocks of channels. Its lines follow in memory, those of rows first.
template <class T>
struct LocatedBin {
  int64_t rows, columns;  // how many lines; none unless it touches
  bool is_nan, touches;
  T inverse, mask;
  T slope_scale[2];  // d coordinate / d offset, over the number of samples; y is axis 0

  Line<T>* row() { return reinterpret_cast<Line<T>*>(this + 1); }
  const Line<T>* row() const { return reinterpret_cast<const Line<T>*>(this + 1); }
  Line<T>* column() { return row() + rows; }
  const Line<T>* column() const { return row() + rows; }
};

// dots[0..2] of all channels, where step(lanes, vectors, channel, totals) adds those of blocks of channels to
// totals[0..2], lane by lane.
template <class T, class Step>
DCN_INLINE void add_up_dots(int64_t channels, const Step& step, T* dots) {
  constexpr int whole = kLanes<T>;
  Vec<T, kDotsPerBin> total = {};
  int64_t done = 0;
  if (channels >= whole) {
    Vec<T, whole> totals[kDotsPerBin] = {};
    for (; done + kBlockVectors * whole <= channels; done += kBlockVectors * whole)
      step(Lanes<whole>{}, Lanes<kBlockVectors>{}, done, totals);
    for (; done + whole <= channels; done += whole) step(Lanes<whole>{}, Lanes<1>{}, done, totals);
    total = sums<T, whole, kDotsPerBin>(totals);
  }
  for_each_vector<T, (whole > 1 ? whole / 2 : 1)>(channels - done, [&](auto lanes, int64_t c) {
    constexpr int some = decltype(lanes)::count;
    Vec<T, some> totals[kDotsPerBin] = {};
    step(lanes, Lanes<1>{}, done + c, totals);
    total += sums<T, some, kDotsPerBin>(totals);
  });
  store(dots, total);
}

// grad_x += gradient * factor * weights over the patch, where asked for; a line of weight 0 is left out.
//
// dots[0..2] = sum over the patch of w * <gradient, x>, w being the weights, the weights with slopes for rows, and
// with slopes for columns. No line is left out: 0 * Inf gives NaN, and so does Inf - Inf where the gradient is
// infinite. Then dot_patch has what is meant.
//
// All three are functions of their own: the compiler fuses products with additions as the code around lets it, and
// bits must not depend on which gradients are asked for.
template <class T, bool kScatter, bool kDots>
[[gnu::noinline]] void visit_patch(const LocatedBin<T>& bin, const Pixels<2>& x, const Pixels<2>& grad_x,
                                   int64_t channels, const T* gradient, T* dots) {
  const T factor = bin.inverse * bin.mask;
  const auto step = [&](auto lanes, auto vectors, int64_t c,
                        auto(&totals)[kDotsPerBin]) __attribute__((always_inline)) {
    constexpr int n = decltype(vectors)::count, width = decltype(lanes)::count;
    using V = Vec<T, width>;
    V gradients[n];
#pragma GCC unroll 8
    for (int k = 0; k < n; ++k) gradients[k] = load<V>(gradient + c + k * width);
    for_each_piece(bin.rows, bin.columns, [&](int64_t r, int64_t last_row, int64_t first, int64_t last) {
      V pieces[3] = {};
      for (; r < last_row; ++r) {
        const Line<T>& row = bin.row()[r];
        const int64_t channel = c * static_cast<int64_t>(sizeof(T));
        const char* x_line = x.data + row.index * x.axis[0] + channel;
        char* grad_line = grad_x.data + row.index * grad_x.axis[0] + channel;
        const T row_factor = factor * row.weight;
        V weighed = {}, moved = {};
        for (int64_t i = first; i < last; ++i) {
          const Line<T>& column = bin.column()[i];
          if (kScatter && row.weight != 0 && column.weight != 0) {
            T* pixel = reinterpret_cast<T*>(grad_line + column.index * grad_x.axis[1]);
            const V weight = broadcast<V>(row_factor * column.weight);
#pragma GCC unroll 8
            for (int k = 0; k < n; ++k)
              store(pixel + k * width, multiply_add(gradients[k], weight, load<V>(pixel + k * width)));
          }
          if constexpr (kDots) {
            const T* pixel = reinterpret_cast<const T*>(x_line + column.index * x.axis[1]);
            V product = {};
#pragma GCC unroll 8
            for (int k = 0; k < n; ++k)
              product = multiply_add(gradients[k], load<V>(pixel + k * width), product);
            weighed = multiply_add(product, broadcast<V>(column.weight), weighed);
            moved = multiply_add(product, broadcast<V>(column.slope), moved);
          }
        }
        if constexpr (kDots) {
          pieces[0] = multiply_add(weighed, broadcast<V>(row.weight), pieces[0]);
          pieces[1] = multiply_add(weighed, broadcast<V>(row.slope), pieces[1]);
          pieces[2] = multiply_add(moved, broadcast<V>(row.weight), pieces[2]);
        }
      }
#pragma GCC unroll 3
      for (int j = 0; j < 3; ++j) totals[j] += pieces[j];
    });
  };
  if constexpr (kDots) return add_up_dots(channels, step, dots);
  for_each_block_of_vectors<T, kBlockVectors>(channels, [&](auto lanes, auto vectors, int64_t c) {
    Vec<T, decltype(lanes)::count> none[kDotsPerBin] = {};
    step(lanes, vectors, c, none);
  });
}

// The same dots = <gradient, sum over the patch of w * x>, and a line whose factor is 0 is left out.
template <class T>
[[gnu::noinline]] void dot_patch(const LocatedBin<T>& bin, const Pixels<2>& x, int64_t channels,
                                 const T* gradient, T* dots) {
  const auto step = [&](auto lanes, auto vectors, int64_t c,
                        auto(&products)[kDotsPerBin]) __attribute__((always_inline)) {
    constexpr int n = decltype(vectors)::count, width = decltype(lanes)::count;
    using V = Vec<T, width>;
    V totals[3][n] = {};
    for_each_piece(bin.rows, bin.columns, [&](int64_t r, int64_t last_row, int64_t first, int64_t last) {
      V pieces[3][n] = {};
      for (; r < last_row; ++r) {
        const Line<T>& row = bin.row()[r];
        const char* line = x.data + row.index * x.axis[0] + c * static_cast<int64_t>(sizeof(T));
        V weighed[n] = {}, moved[n] = {};
        for (int64_t i = first; i < last; ++i) {
          const Line<T>& column = bin.column()[i];
          const T* pixel = reinterpret_cast<const T*>(line + column.index * x.axis[1]);
          for (int k = 0; k < n; ++k) {
            const V value = load<V>(pixel + k * width);
            if (column.weight != 0) weighed[k] += broadcast<V>(column.weight) * value;
            if (column.slope != 0) moved[k] += broadcast<V>(column.slope) * value;
          }
        }
        for (int k = 0; k < n; ++k) {
          if (row.weight != 0) pieces[0][k] += broadcast<V>(row.weight) * weighed[k];
          if (row.slope != 0) pieces[1][k] += broadcast<V>(row.slope) * weighed[k];
          if (row.weight != 0) pieces[2][k] += broadcast<V>(row.weight) * moved[k];
        }
      }
      for (int j = 0; j < 3; ++j)
        for (int k = 0; k < n; ++k) totals[j][k] += pieces[j][k];
    });
    for (int j = 0; j < 3; ++j)
      for (int k = 0; k < n; ++k) products[j] += load<V>(gradient + c + k * width) * totals[j][k];
  };
  add_up_dots(channels, step, dots);
}

}  // namespace dcn::DCN_ISA
