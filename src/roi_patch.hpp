// The pixels that a bin averages, and what is done with them.
//
// The samples of a bin form a grid, so their weights are those of rows times those of columns: a patch. Its
// lines are rows or columns of pixels, each once, however many samples share it.
#pragma once

#include "layout.hpp"
#include "matmul.hpp"
#include "roi_sampling.hpp"

namespace dcn::DCN_ISA {

// A block of channels has dots of its own, so that bits do not depend on how many a thread takes at a time.
constexpr int kBlockVectors = 4;
template <class T>
constexpr int kBlock = kBlockVectors * kLanes<T>;
constexpr int kTogether = 2;    // blocks
constexpr int kDotsPerBin = 4;  // three are used: a vector of four is what sums() gives

template <class T>
struct Line {
  int64_t index;  // of the row or column of x
  T weight;       // sum over the samples of the weight of this line
  T slope;        // sum over the samples of the derivative of that weight by the coordinate
};

// Lines are copied so many at a time: what they are copied from and to has room for as many more.
constexpr int64_t kLinesTogether = 4;
template <class T>
DCN_INLINE void copy_lines(const Line<T>* from, int64_t count, Line<T>* to) {
  for (int64_t i = 0; i < count; i += kLinesTogether)
    __builtin_memcpy(to + i, from + i, kLinesTogether * sizeof(Line<T>));
}

template <class T>
struct Lines {
  using Sums = Vec<double, 2>;  // of weights, and of slopes

  Line<T>* line;  // ascending; room for every line of x
  Sums* sums;     // the same numbers while they are summed, where that takes more than two
  int64_t count;
  double samples;  // what the axis contributes to the number of samples of the average
  bool weighs;     // a line has a weight

  // Lines that only a derivative sees are left out unless kSlopes.
  template <bool kSlopes>
  DCN_INLINE void find(const RoIAxis& axis, double base) {
    if (!find_inside<kSlopes>(axis, base)) find_any<kSlopes>(axis, base);
  }

 private:
  template <bool kSlopes>
  [[gnu::noinline]] void find_any(const RoIAxis& axis, double base) {
    count = 0;
    int64_t inside = 0;
    const RoISpan span = roi_span(axis, base);
    for (int64_t i = 0; i < span.count; ++i) {
      const int64_t k = axis.step < 0 ? span.count - 1 - i : i;
      const RoISample sample = roi_sample(axis, axis.coordinate(base, span.first + static_cast<double>(k)));
      if (!sample.inside) continue;
      ++inside;
      const bool moves = kSlopes && sample.moves;
      const double slope = moves ? 1 : 0;
      sums[line_of(sample.low)] += Sums{1 - sample.fraction, -slope};
      if (sample.fraction == 0 && !moves) continue;
      sums[line_of(sample.low + 1)] += Sums{sample.fraction, slope};
    }
    samples = axis.counts_all ? axis.samples : static_cast<double>(inside);
    weighs = false;
    for (int64_t i = 0; i < count; ++i) {
      line[i].weight = static_cast<T>(sums[i][0]);
      line[i].slope = static_cast<T>(sums[i][1]);
      weighs |= line[i].weight != 0;
    }
  }

  // Ascending samples touch no line but the last two again.
  DCN_INLINE int64_t line_of(int64_t index) {
    for (int64_t i = count - 1; i >= 0 && i >= count - 2; --i)
      if (line[i].index == index) return i;
    line[count].index = index;
    sums[count] = Sums{};
    return count++;
  }

  // The same for a few samples that all lie between pixels, as most do: no branch depends on where, for it would be
  // a guess.
  template <bool kSlopes>
  DCN_INLINE bool find_inside(const RoIAxis& axis, double base) {
    const auto coordinate_of = [&](double i) {
      return axis.coordinate(base, axis.step < 0 ? axis.samples - 1 - i : i);
    };
    if (!(axis.samples <= kFewSamples && axis.between_pixels(coordinate_of(0)) &&
          axis.between_pixels(coordinate_of(axis.samples - 1))))
      return false;
    Sums low = {}, high = {};  // of the last two lines
    int64_t at = 0, before = INT64_MAX;
    bool at_pixel = false;
    for (double i = 0; i < axis.samples; ++i) {
      const double coordinate = coordinate_of(i);
      const int64_t index = static_cast<int64_t>(coordinate);
      const double fraction = coordinate - static_cast<double>(index);
      at_pixel |= fraction == 0;
      const int64_t ahead = index - before;
      const auto same = broadcast<Vec<int64_t, 2>>(ahead) == 0, next = broadcast<Vec<int64_t, 2>>(ahead) == 1;
      low = same ? low : next ? high : Sums{};
      high = same ? high : Sums{};
      low += Sums{1 - fraction, -1};
      high += Sums{fraction, 1};
      at += ahead > 0 ? least(ahead, 2) : 0;
      before = index;
      line[at] = {index, static_cast<T>(low[0]), static_cast<T>(low[1])};
      line[at + 1] = {index + 1, static_cast<T>(high[0]), static_cast<T>(high[1])};
    }
    if (!kSlopes && at_pixel) return false;
    count = at + 2, samples = axis.samples, weighs = true;
    return true;
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

// Calls body(lanes, vectors, channel) for the channels from c on: kWide vectors at a time, a power of two, then half
// as many, ..., and the rest.
template <class T, int kWide, class Body>
DCN_INLINE void for_each_block_of_vectors(int64_t channels, const Body& body, int64_t c = 0) {
  if constexpr (kWide > 1) {
    for (; c + kWide * kLanes<T> <= channels; c += kWide * kLanes<T>)
      body(Lanes<kLanes<T>>{}, Lanes<kWide>{}, c);
    for_each_block_of_vectors<T, kWide / 2>(channels, body, c);
  } else {
    for_each_vector<T>(channels - c, [&](auto lanes, int64_t rest) { body(lanes, Lanes<1>{}, c + rest); });
  }
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
  T factor;               // of the weights

  Line<T>* row() { return reinterpret_cast<Line<T>*>(this + 1); }
  const Line<T>* row() const { return reinterpret_cast<const Line<T>*>(this + 1); }
  Line<T>* column() { return row() + rows; }
  const Line<T>* column() const { return row() + rows; }
};

// Dots of each block, where step(lanes, vectors, channel, totals) adds those of totals' blocks to the first
// three of each, lane by lane.
template <class T, class Step>
DCN_INLINE void add_up_dots(int64_t channels, const Step& step, T* dots) {
  constexpr int whole = kLanes<T>;
  int64_t done = 0;
  const auto whole_blocks = [&](auto together) __attribute__((always_inline)) {
    constexpr int n = decltype(together)::count;
    for (; done + n * kBlock<T> <= channels; done += n * kBlock<T>) {
      Vec<T, whole> totals[n][kDotsPerBin] = {};
      step(Lanes<whole>{}, Lanes<kBlockVectors>{}, done, totals);
      for (int b = 0; b < n; ++b, dots += kDotsPerBin) store(dots, sums<T, whole, kDotsPerBin>(totals[b]));
    }
  };
  whole_blocks(Lanes<kTogether>{});
  whole_blocks(Lanes<1>{});
  if (done == channels) return;
  Vec<T, kDotsPerBin> total = {};
  for_each_block_of_vectors<T, kBlockVectors / 2>(
      channels,
      [&](auto lanes, auto vectors, int64_t c) {
        constexpr int some = decltype(lanes)::count;
        Vec<T, some> totals[1][kDotsPerBin] = {};
        step(lanes, vectors, c, totals);
        total += sums<T, some, kDotsPerBin>(totals[0]);
      },
      done);
  store(dots, total);
}

// grad_x += gradient * factor * weights over the patch, where asked for; a line of weight 0 is left out.
//
// dots[0..2] = sum over the patch of w * <gradient, x>, w being the weights, the weights with slopes for
// rows, and with slopes for columns. No line is left out: 0 * Inf gives NaN, and so does Inf - Inf where the
// gradient is infinite. Then dot_patch has what is meant.
//
// Bits must not depend on which gradients are asked for: hence multiply_add. There are kColumns columns, or any
// number where that is 0.
template <class T, bool kScatter, bool kDots, int kColumns>
[[gnu::noinline]] void visit_columns(const LocatedBin<T>& bin, const Pixels<2>& x, const Pixels<2>& grad_x,
                                     int64_t channels, const T* gradient, T* dots) {
  const auto step = [&](auto lanes, auto vectors, int64_t c, auto& totals) __attribute__((always_inline)) {
    constexpr int n = decltype(vectors)::count, width = decltype(lanes)::count;
    constexpr int blocks = sizeof(totals) / sizeof(totals[0]);
    using V = Vec<T, width>;
    V gradients[blocks * n];
#pragma GCC unroll 8
    for (int k = 0; k < blocks * n; ++k) gradients[k] = load<V>(gradient + c + k * width);
    const int64_t columns = kColumns ? kColumns : bin.columns;
    for_each_piece(bin.rows, columns, [&](int64_t r, int64_t last_row, int64_t first, int64_t last) {
      V pieces[blocks][3] = {};
      for (; r < last_row; ++r) {
        const Line<T>& row = bin.row()[r];
        const int64_t channel = c * static_cast<int64_t>(sizeof(T));
        const char* x_line = x.data + row.index * x.axis[0] + channel;
        char* grad_line = grad_x.data + row.index * grad_x.axis[0] + channel;
        const T row_factor = bin.factor * row.weight;
        V weighed[blocks] = {}, moved[blocks] = {};
        const auto visit_pixel = [&](int64_t i) __attribute__((always_inline)) {
          const Line<T>& column = bin.column()[i];
          if (kScatter && row.weight != 0 && column.weight != 0) {
            T* pixel = reinterpret_cast<T*>(grad_line + column.index * grad_x.axis[1]);
            const V weight = broadcast<V>(row_factor * column.weight);
#pragma GCC unroll 8
            for (int k = 0; k < blocks * n; ++k)
              store(pixel + k * width, multiply_add(gradients[k], weight, load<V>(pixel + k * width)));
          }
          if constexpr (kDots) {
            const T* pixel = reinterpret_cast<const T*>(x_line + column.index * x.axis[1]);
#pragma GCC unroll 2
            for (int b = 0; b < blocks; ++b) {
              V product = {};
#pragma GCC unroll 4
              for (int k = b * n; k < b * n + n; ++k)
                product = multiply_add(gradients[k], load<V>(pixel + k * width), product);
              weighed[b] = multiply_add(product, broadcast<V>(column.weight), weighed[b]);
              moved[b] = multiply_add(product, broadcast<V>(column.slope), moved[b]);
            }
          }
        };
        if constexpr (kColumns) {
#pragma GCC unroll 4
          for (int i = 0; i < kColumns; ++i) visit_pixel(i);
        } else {
          for (int64_t i = first; i < last; ++i) visit_pixel(i);
        }
        if constexpr (kDots) {
#pragma GCC unroll 2
          for (int b = 0; b < blocks; ++b) {
            pieces[b][0] = multiply_add(weighed[b], broadcast<V>(row.weight), pieces[b][0]);
            pieces[b][1] = multiply_add(weighed[b], broadcast<V>(row.slope), pieces[b][1]);
            pieces[b][2] = multiply_add(moved[b], broadcast<V>(row.weight), pieces[b][2]);
          }
        }
      }
#pragma GCC unroll 2
      for (int b = 0; b < blocks; ++b)
#pragma GCC unroll 3
        for (int j = 0; j < 3; ++j) totals[b][j] += pieces[b][j];
    });
  };
  if constexpr (kDots) return add_up_dots(channels, step, dots);
  for_each_block_of_vectors<T, kBlockVectors * kTogether>(channels, [&](auto lanes, auto vectors, int64_t c) {
    Vec<T, decltype(lanes)::count> none[1][kDotsPerBin] = {};
    step(lanes, vectors, c, none);
  });
}

// With both at each pixel, a loop over a few columns ends in a guess that costs more than its code.
template <class T, bool kScatter, bool kDots>
void visit_patch(const LocatedBin<T>& bin, const Pixels<2>& x, const Pixels<2>& grad_x, int64_t channels,
                 const T* gradient, T* dots) {
  if constexpr (kScatter && kDots) {
    if (bin.columns == 2) return visit_columns<T, true, true, 2>(bin, x, grad_x, channels, gradient, dots);
    if (bin.columns == 3) return visit_columns<T, true, true, 3>(bin, x, grad_x, channels, gradient, dots);
    if (bin.columns == 4) return visit_columns<T, true, true, 4>(bin, x, grad_x, channels, gradient, dots);
  }
  visit_columns<T, kScatter, kDots, 0>(bin, x, grad_x, channels, gradient, dots);
}

// The same dots = <gradient, sum over the patch of w * x>, and a line whose factor is 0 is left out.
template <class T>
[[gnu::noinline]] void dot_patch(const LocatedBin<T>& bin, const Pixels<2>& x, int64_t channels,
                                 const T* gradient, T* dots) {
  const auto step = [&](auto lanes, auto vectors, int64_t c, auto& products) __attribute__((always_inline)) {
    constexpr int n = decltype(vectors)::count, width = decltype(lanes)::count;
    constexpr int blocks = sizeof(products) / sizeof(products[0]);
    using V = Vec<T, width>;
    for (int k = 0; k < blocks * n; ++k) {
      const int64_t channel = c + k * width;
      V totals[3] = {};
      for_each_piece(bin.rows, bin.columns, [&](int64_t r, int64_t last_row, int64_t first, int64_t last) {
        V pieces[3] = {};
        for (; r < last_row; ++r) {
          const Line<T>& row = bin.row()[r];
          const char* line = x.data + row.index * x.axis[0] + channel * static_cast<int64_t>(sizeof(T));
          V weighed = {}, moved = {};
          for (int64_t i = first; i < last; ++i) {
            const Line<T>& column = bin.column()[i];
            const V value = load<V>(reinterpret_cast<const T*>(line + column.index * x.axis[1]));
            if (column.weight != 0) weighed += broadcast<V>(column.weight) * value;
            if (column.slope != 0) moved += broadcast<V>(column.slope) * value;
          }
          if (row.weight != 0) pieces[0] += broadcast<V>(row.weight) * weighed;
          if (row.slope != 0) pieces[1] += broadcast<V>(row.slope) * weighed;
          if (row.weight != 0) pieces[2] += broadcast<V>(row.weight) * moved;
        }
        for (int j = 0; j < 3; ++j) totals[j] += pieces[j];
      });
      for (int j = 0; j < 3; ++j) products[k / n][j] += load<V>(gradient + channel) * totals[j];
    }
  };
  add_up_dots(channels, step, dots);
}

}  // namespace dcn::DCN_ISA
