// What the tile version of the sparse-linear forward shares: shapes of packed operands, and rows on their way to tiles.
#pragma once
#include "cpu/tiles.h"
#include "cpu/sla.h"
#if defined(__AVX512BF16__)

namespace triskele::TRISKELE_LEVEL::sla_tiles {

constexpr int64_t kStrip = tile::kDepth, kChunk = 2, kBatch = 8;

template <class T>
constexpr int kPlanes = sizeof(T) == sizeof(float) ? 3 : 1;

template <class T>
struct View {  // of a [B, H, L, D] tensor of any strides
  View(const Tensor& x, int64_t heads)
      : data(static_cast<const T*>(x.const_data_ptr())), batch(x.stride(0)), head(x.stride(1)), row(x.stride(2)),
        column(x.stride(3)), heads(heads) {}
  const T* of(int64_t index) const { return data + index / heads * batch + index % heads * head; }
  const T* data;
  int64_t batch, head, row, column, heads;
};

struct Layout {
  Layout(const Problem& p, int planes)
      : steps((p.dim + 31) / 32), sides((p.dim + 15) / 16), depth(steps * 32), rows(sides * 16),
        k_plane(2 * steps * tile::kWords), v_plane(sides * tile::kWords), k_words(planes * k_plane),
        v_words(planes * v_plane), a_block((p.block_k + kStrip - 1) / kStrip), strips(p.k_blocks() * a_block) {}
  int64_t words() const { return strips * (k_words + v_words); }  // of a head
  int64_t steps, sides;      // D in depths of 32 and in tiles of 16
  int64_t depth, rows;       // D rounded up to each
  int64_t k_plane, v_plane;  // words of a strip, a plane: K [2, steps] tiles, V^T [sides] tiles
  int64_t k_words, v_words;  // and of all planes
  int64_t a_block, strips;   // strips of a block, of a head
};

class Words16 {  // bfloat16 words on a cache line boundary
 public:
  explicit Words16(int64_t count) : floats_((count + 1) / 2) {}
  operator uint16_t*() const { return reinterpret_cast<uint16_t*>(static_cast<float*>(floats_)); }

 private:
  Scratch floats_;
};

// The tile registers, and subnormal results and operands as zero, as the tiles have them: vectors would take very long.
class Mode {
 public:
  Mode() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~Mode() { _mm_setcsr(before_); }
  Mode(const Mode&) = delete;
  Mode& operator=(const Mode&) = delete;

 private:
  const tile::Registers registers_;
  const unsigned before_;
};

// Rows of an input on their way to tiles. Float32 rows are copied, cut into planes and turned as floats; bfloat16 rows
// are words, read where they are if they can be: a pair of columns is one 32-bit word, so that turning 16 rows of 32
// columns as such words gives a B tile, and turning a B tile gives an A tile of the columns.
template <class T>
class Stage;

template <>
class Stage<float> {
 public:
  Stage(const Layout& l, int64_t rows) : depth_(l.depth), rows_(rows * l.depth) {}

  // `count` rows, those of `index` or consecutive ones, and zeros up to a multiple of 16 or, for keys, a strip.
  void load(const View<float>& x, int64_t head, const int64_t* index, int64_t first, int64_t count, int64_t rows,
            int64_t dim) {
    const float* from = x.of(head);
    float* to = rows_;
    for (int64_t r = 0; r < count; ++r, to += depth_) {
      const float* row = from + (index != nullptr ? index[first + r] : first + r) * x.row;
      if (x.column == 1) std::memcpy(to, row, dim * sizeof(float));
      else for (int64_t d = 0; d < dim; ++d) to[d] = row[d * x.column];
      std::fill(to + dim, to + depth_, 0.f);
    }
    std::fill(to, to + (rows - count) * depth_, 0.f);
  }

  // Rows [16 m, + 16), columns [32 s, + 32) -> an A tile.
  void tile_of(int64_t m, int64_t s, uint16_t* to, int64_t plane) const {
    tile::pack_a<3>(rows_ + m * 16 * depth_ + s * 32, depth_, to, plane);
  }

  // Rows [0, 32), columns [16 m, + 16) -> a B tile of each m < sides.
  void pairs(int64_t sides, uint16_t* to, int64_t plane) const {
    for (int64_t m = 0; m < sides; ++m) tile::pack_b<3>(rows_ + m * 16, depth_, to + m * tile::kWords, plane);
  }

  // The same, with rows and columns exchanged -> A tiles. `lanes`: scratch.
  void columns(int64_t sides, uint16_t* to, int64_t plane, float* lanes) const {
    turn(kStrip, lanes);
    for (int64_t m = 0; m < sides; ++m) tile::pack_a<3>(lanes + m * 16 * kLanes, kLanes, to + m * tile::kWords, plane);
  }

  // `count` rows -> lanes [depth, kLanes].
  void turn(int64_t count, float* lanes) const {
    for (int64_t r = 0; r < count; r += kVec)
      for (int64_t d = 0; d < depth_; d += kVec)
        transpose(rows_ + r * depth_ + d, depth_, lanes + d * kLanes + r, kLanes, 1.f);
  }

 private:
  int64_t depth_;
  Scratch rows_;
};

template <>
class Stage<uint16_t> {
 public:
  Stage(const Layout& l, int64_t rows) : depth_(l.depth), copy_(rows * l.depth), zero_(l.depth) {
    std::fill(zero_ + 0, zero_ + depth_, uint16_t{0});
  }

  void load(const View<uint16_t>& x, int64_t head, const int64_t* index, int64_t first, int64_t count, int64_t rows,
            int64_t dim) {
    const uint16_t* from = x.of(head);
    const bool in_place = x.column == 1 && dim == depth_;
    for (int64_t r = 0; r < count; ++r) {
      const uint16_t* row = from + (index != nullptr ? index[first + r] : first + r) * x.row;
      at_[r] = row;
      if (in_place) continue;
      uint16_t* to = copy_ + r * depth_;
      for (int64_t d = 0; d < dim; ++d) to[d] = row[d * x.column];
      std::fill(to + dim, to + depth_, uint16_t{0});
      at_[r] = to;
    }
    std::fill(at_ + count, at_ + rows, zero_ + 0);
  }

  void tile_of(int64_t m, int64_t s, uint16_t* to, int64_t) const {
    for (int64_t r = 0; r < 16; ++r) std::memcpy(to + r * 32, at_[m * 16 + r] + s * 32, 64);
  }

  void pairs(int64_t sides, uint16_t* to, int64_t) const {
    for (int64_t m = 0; m < sides; ++m)
      for (int64_t i = 0; i < 16; ++i) tile::store(to + m * tile::kWords + i * 32, pair(i, m));
  }

  void columns(int64_t sides, uint16_t* to, int64_t, float*) const {
    for (int64_t m = 0; m < sides; ++m) {
      Floats words[16];
      for (int64_t i = 0; i < 16; ++i) words[i] = reinterpret_cast<Floats>(pair(i, m));
      transpose_step<kVec / 2>(words);
      for (int64_t i = 0; i < 16; ++i) std::memcpy(to + m * tile::kWords + i * 32, &words[i], 64);
    }
  }

  void turn(int64_t count, float* lanes) const {
    for (int64_t r = 0; r < count; r += kVec)
      for (int64_t s = 0; s < depth_ / 32; ++s) {
        Floats words[16];
        words_of(r, s, words);
        float* to = lanes + s * 32 * kLanes + r;
        for (int64_t i = 0; i < 16; ++i) {
          const tile::Words both = reinterpret_cast<tile::Words>(words[i]);
          store(to + 2 * i * kLanes, reinterpret_cast<Floats>(both << 16));
          store(to + (2 * i + 1) * kLanes, reinterpret_cast<Floats>(both & 0xFFFF0000u));
        }
      }
  }

  // `count` rows -> B tiles [steps, 4], a row a column, with their signs turned where `negative`.
  void operand(int64_t count, bool negative, uint16_t* to) const {
    const tile::Words sign = tile::Words{} + (negative ? 0x80008000u : 0u);
    for (int64_t r = 0; r < count; r += kVec)
      for (int64_t s = 0; s < depth_ / 32; ++s) {
        Floats words[16];
        words_of(r, s, words);
        for (int64_t i = 0; i < 16; ++i)
          tile::store(to + (s * 4 + r / kVec) * tile::kWords + i * 32, reinterpret_cast<tile::Words>(words[i]) ^ sign);
      }
  }

 private:
  tile::Words pair(int64_t i, int64_t m) const {  // rows 2i and 2i+1, columns [16 m, + 16)
    tile::Halves even, odd;
    std::memcpy(&even, at_[2 * i] + m * 16, sizeof even);
    std::memcpy(&odd, at_[2 * i + 1] + m * 16, sizeof odd);
    return __builtin_convertvector(even, tile::Words) | (__builtin_convertvector(odd, tile::Words) << 16);
  }

  void words_of(int64_t row, int64_t s, Floats* words) const {  // [16 pairs of columns][16 rows]
    for (int64_t i = 0; i < 16; ++i) std::memcpy(&words[i], at_[row + i] + s * 32, 64);
    transpose_step<kVec / 2>(words);
  }

  int64_t depth_;
  Words16 copy_, zero_;
  const uint16_t* at_[kLanes];
};

}  // namespace triskele::TRISKELE_LEVEL::sla_tiles
#endif
