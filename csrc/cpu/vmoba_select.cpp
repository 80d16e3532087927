// VMoBA's choice of chunks on the CPU.
//
// Promise: any strides; gates summed in float64 and rounded once to float32, so that they do not depend on blocking and
// near-ties fall as in the reference; equal gates rank by chunk, head, token; the same mask whatever the number of
// threads. A pool of many queries is cut by a radix search over its gates: three passes, nothing sorted or copied.
#include "cpu/vmoba.h"

#include "cpu/level.h"

namespace triskele::TRISKELE_LEVEL {
namespace vmoba {

typedef double Doubles __attribute__((vector_size(kVec * sizeof(float))));
constexpr int64_t kDoubles = kVec / 2;

inline double to_double(double x) { return x; }
inline double to_double(float x) { return x; }
inline double to_double(BFloat16 x) { return to_float(x); }

inline Doubles load_doubles(const double* p) {
  Doubles x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

// Ranks as the gates do, larger first: 0 is +inf, NaN comes before it. -0 and 0 are one.
inline uint32_t descending_key(float gate) {
  gate += 0.0f;
  uint32_t u;
  std::memcpy(&u, &gate, 4);
  if (gate != gate) u = 0x7fc00000;
  return ~(u ^ (u >> 31 ? 0xffffffffu : 0x80000000u));
}

inline float gate_of_key(uint32_t key) {
  key = ~key;
  key ^= key >> 31 ? 0x80000000u : 0xffffffffu;
  float gate;
  std::memcpy(&gate, &key, 4);
  return gate;
}

// Gates of Rows queries and of Vecs vectors of chunks from `first` on -> out [chunks][S]
template <int Rows, int Vecs>
void dots(const Shape& s, const double (*lines)[kMaxDim], const double* means, int64_t stride, int64_t first,
          int64_t count, float* out) {
  Doubles sum[Rows][Vecs] = {};
  for (int64_t d = 0; d < s.dim; ++d, means += stride) {
    Doubles mean[Vecs];
    for (int n = 0; n < Vecs; ++n) mean[n] = load_doubles(means + n * kDoubles);
    for (int i = 0; i < Rows; ++i)
      for (int n = 0; n < Vecs; ++n) sum[i][n] += lines[i][d] * mean[n];
  }
  for (int64_t j = 0; j < std::min(Vecs * kDoubles, s.chunks - first); ++j)
    for (int64_t i = 0; i < count; ++i) out[j * s.length + i] = static_cast<float>(sum[i][j / kDoubles][j % kDoubles]);
}

// g = q_s . mean(K_c) -> out [pairs][C][S] by token
template <class T>
void gates(const Shape& s, const Tensor& q, const Tensor& k, float* out) {
  const Rows<T> queries(q), keys(k);
  const int64_t padded = round_up(s.chunks, kDoubles);
  std::vector<double> means(s.pairs() * s.dim * padded);  // [pairs][D][padded]
  torch::stable::parallel_for(0, s.pairs() * s.chunks, 1, [&](int64_t begin, int64_t end) {
    double sum[kMaxDim];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t pair = i / s.chunks, c = i % s.chunks;
      std::fill(sum, sum + s.dim, 0.0);
      for (int64_t j = s.bounds[c]; j < s.bounds[c + 1]; ++j)
        keys.each(pair, s.order[j], [&](int64_t d, const T& x) { sum[d] += to_double(x); });
      const double count = static_cast<double>(s.bounds[c + 1] - s.bounds[c]);
      for (int64_t d = 0; d < s.dim; ++d) means[(pair * s.dim + d) * padded + c] = sum[d] / count;
    }
  });
  constexpr int64_t kBlock = 8;
  const int64_t tasks = (s.length + kBlock - 1) / kBlock;
  torch::stable::parallel_for(0, s.pairs() * tasks, 16, [&](int64_t begin, int64_t end) {
    double lines[kBlock][kMaxDim];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t pair = task / tasks, first = task % tasks * kBlock, count = std::min(kBlock, s.length - first);
      for (int64_t i = 0; i < kBlock; ++i)  // past the end, the last query once more
        queries.each(pair, first + std::min(i, count - 1), [&](int64_t d, const T& x) { lines[i][d] = to_double(x); });
      const double* mean = &means[pair * s.dim * padded];
      float* to = out + pair * s.chunks * s.length + first;
      int64_t c = 0;
      for (; c + kDoubles < padded; c += 2 * kDoubles)
        dots<kBlock, 2>(s, lines, mean + c, padded, c, count, to + c * s.length);
      if (c < padded) dots<kBlock, 1>(s, lines, mean + c, padded, c, count, to + c * s.length);
    }
  });
}

struct Choice {
  bool topk;
  int64_t count;      // top-k: other chunks kept, a pool
  double threshold;
};

// n = (g - low) / spread, their sum with 1e-6 on top, and the share that the other chunks have to bring.
struct Norm {
  double low, spread, total, rest;
};

// The entries of a pool: chunks [c0, c1), heads [h0, h1) of one sample, every token; (chunk, head, token) order.
struct Pool {
  const Shape& s;
  const float* gates;                 // of the sample, [H][C][S]
  const std::vector<int32_t>& chunk;  // of each token
  int64_t c0, c1, h0, h1;

  template <class F>
  void each(const F& f) const {  // f(c, h, token, gate, own)
    for (int64_t c = c0; c < c1; ++c)
      for (int64_t h = h0; h < h1; ++h) {
        const float* g = gates + (h * s.chunks + c) * s.length;
        for (int64_t i = 0; i < s.length; ++i) f(c, h, i, g[i], chunk[i] == c);
      }
  }
};

template <class Each>
Norm normalise(const Each& each, double threshold) {
  float low = kInf, high = -kInf;
  bool nan = false;
  each([&](float g, bool) { low = std::min(low, g), high = std::max(high, g), nan |= g != g; });
  Norm n{low, double(high) - low, 1e-6, 0};
  if (nan) n.low = std::numeric_limits<double>::quiet_NaN();
  if (!(n.spread > 1e-6)) n.spread = 1;
  double own_sum = 0;
  each([&](float g, bool own) {
    const double x = (g - n.low) / n.spread;
    n.total += x;
    if (own) own_sum += x;
  });
  n.rest = std::max(0.0, threshold - own_sum / n.total);
  return n;
}

// Among equal keys, how many more (1 .. count) until `sum` plus so many times x reaches the share.
int64_t ties_needed(const Norm& n, double sum, double x, int64_t count) {
  const auto reached = [&](int64_t j) { return (sum + double(j) * x) / n.total >= n.rest; };
  int64_t low = 1, high = count;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (reached(middle)) high = middle; else low = middle + 1;
  }
  return low;
}

// Where a pool's ranking is cut: other chunks with a smaller key are in, and the first `ties` of those with `key`.
struct Cut {
  uint64_t key;
  int64_t ties;
};

// Narrows the key three digits at a time from the top, each by one histogram: nothing is sorted.
Cut find_cut(const Pool& pool, const Choice& choice) {
  constexpr Cut everything{uint64_t(1) << 32, 0};
  int64_t others = 0;
  pool.each([&](int64_t, int64_t, int64_t, float, bool own) { others += !own; });
  if (choice.topk && choice.count == 0) return {0, 0};
  if (others == 0 || (choice.topk ? choice.count >= others : choice.threshold >= 1)) return everything;
  Norm n{0, 1, 1, 0};
  if (!choice.topk)
    n = normalise(
        [&](const auto& f) { pool.each([&](int64_t, int64_t, int64_t, float g, bool own) { f(g, own); }); },
        choice.threshold);
  std::vector<int64_t> counts;
  std::vector<double> sums;
  uint32_t prefix = 0;
  int64_t count_before = 0;
  double sum_before = 0;
  for (int shift = 21, bits = 11, done = 0; done < 32; done += bits, bits = std::min(11, 32 - done), shift -= bits) {
    counts.assign(size_t(1) << bits, 0);
    sums.assign(size_t(1) << bits, 0.0);
    pool.each([&](int64_t, int64_t, int64_t, float g, bool own) {
      const uint32_t key = descending_key(g);
      if (own || (done && key >> (shift + bits) != prefix)) return;
      const uint32_t digit = (key >> shift) & ((1u << bits) - 1);
      ++counts[digit];
      if (!choice.topk) sums[digit] += (g - n.low) / n.spread;
    });
    int64_t chosen = -1;
    for (int64_t digit = 0; digit < int64_t(counts.size()); ++digit) {
      if (counts[digit] == 0) continue;
      if (choice.topk ? count_before + counts[digit] >= choice.count
                      : (sum_before + sums[digit]) / n.total >= n.rest) {
        chosen = digit;
        break;
      }
      count_before += counts[digit];
      sum_before += sums[digit];
    }
    if (chosen < 0) {
      if (done == 0) return everything;
      // The digits' sums fell short of their parent's by a rounding: the last one is where it is reached.
      chosen = int64_t(counts.size()) - 1;
      while (counts[chosen] == 0) --chosen;
      count_before -= counts[chosen];
      sum_before -= sums[chosen];
    }
    prefix = prefix << bits | uint32_t(chosen);
    if (shift == 0) {
      if (choice.topk) return {prefix, choice.count - count_before};
      return {prefix, ties_needed(n, sum_before, (gate_of_key(prefix) - n.low) / n.spread, counts[chosen])};
    }
  }
  return everything;
}

// Pools of more than one query: mask bytes [C][H][S] of one sample.
void choose_pool(const Pool& pool, const Choice& choice, uint8_t* mask) {
  Cut cut = find_cut(pool, choice);
  pool.each([&](int64_t c, int64_t h, int64_t i, float g, bool own) {
    const uint64_t key = descending_key(g);
    mask[(c * pool.s.heads + h) * pool.s.length + i] = own || key < cut.key || (key == cut.key && cut.ties-- > 0);
  });
}

// One query: few enough chunks to rank them. `gates` and `mask` hold an entry a chunk, so far apart.
struct Query {
  const float* gates;
  uint8_t* mask;
  int64_t chunks, own, gate_stride, mask_stride;

  float gate(uint64_t key) const { return gates[static_cast<int64_t>(key & 0xffffffffu) * gate_stride]; }

  // `keys` is scratch. They carry the chunk in their low half, so that no two are equal.
  void choose(const Choice& choice, std::vector<uint64_t>& keys) const {
    keys.clear();
    for (int64_t c = 0; c < chunks; ++c) {
      mask[c * mask_stride] = c == own;
      if (c != own) keys.push_back(static_cast<uint64_t>(descending_key(gates[c * gate_stride])) << 32 | c);
    }
    size_t kept = keys.size();
    if (choice.topk) {
      kept = std::min(kept, static_cast<size_t>(choice.count));
      if (kept < keys.size()) std::nth_element(keys.begin(), keys.begin() + kept, keys.end());
    } else if (choice.threshold < 1 && kept > 0) {
      const auto each = [&](const auto& f) {
        for (int64_t c = 0; c < chunks; ++c) f(gates[c * gate_stride], c == own);
      };
      const Norm n = normalise(each, choice.threshold);
      std::sort(keys.begin(), keys.end());
      double sum = 0;
      for (size_t i = 0; i < keys.size(); ++i) {
        sum += (gate(keys[i]) - n.low) / n.spread;
        if (sum / n.total >= n.rest) {
          kept = i + 1;
          break;
        }
      }
    }
    for (size_t i = 0; i < kept; ++i) mask[static_cast<int64_t>(keys[i] & 0xffffffffu) * mask_stride] = 1;
  }
};

// Top-k of kVec neighbouring queries at once, one a lane, for few places: the best keys so far stay in registers.
// Keys are signed here, larger first; chunk by chunk, a tie leaves the earlier chunk in front.
constexpr int64_t kFewPlaces = 16;

void choose_lanes(const Query& first, const int32_t* own, int64_t places) {
  constexpr int32_t kNone = std::numeric_limits<int32_t>::min();  // below every gate's key
  Ints own_chunks;
  std::memcpy(&own_chunks, own, sizeof own_chunks);
  const auto keys_of = [&](int64_t c) {  // descending_key, its order turned
    const Floats gates = load(first.gates + c * first.gate_stride) + 0.f;
    Ints bits = reinterpret_cast<Ints>(gates);
    bits = gates == gates ? bits : Ints{} + 0x7fc00000;
    const Ints keys = bits ^ ((bits >> 31) & 0x7fffffff);
    return own_chunks == static_cast<int32_t>(c) ? Ints{} + kNone : keys;
  };
  Ints best[kFewPlaces];
  for (int64_t j = 0; j < places; ++j) best[j] = Ints{} + kNone;
  for (int64_t c = 0; c < first.chunks; ++c) {
    Ints key = keys_of(c);
    for (int64_t j = 0; j < places; ++j) {
      const Ints larger = key > best[j] ? key : best[j];
      key = key > best[j] ? best[j] : key;
      best[j] = larger;
    }
  }
  const Ints last = places > 0 ? best[places - 1] : Ints{} + std::numeric_limits<int32_t>::max();
  Ints ties{};  // places left for keys equal to the last one; masks are -1 where true
  for (int64_t j = 0; j < places; ++j) ties -= best[j] == last;
  for (int64_t c = 0; c < first.chunks; ++c) {
    const Ints key = keys_of(c), tied = (key == last) & (ties > 0);
    ties += tied;
    const Ints chosen = (key == kNone) | (key > last) | tied;  // kNone: the own chunk
    int32_t lanes[kVec];
    std::memcpy(lanes, &chosen, sizeof lanes);
    for (int64_t i = 0; i < kVec; ++i) first.mask[c * first.mask_stride + i] = lanes[i] != 0;
  }
}

Tensor vmoba_select(Tensor q, Tensor k, std::optional<Tensor> order, Tensor bounds, std::string mode, std::string pool,
                    int64_t top_k, double threshold) {
  constexpr const char* op = "vmoba_select";
  const Shape s = read_shape(op, q, order, bounds);
  check_like(op, "k", k, q);
  check_that(mode == "topk" || mode == "threshold", op, "mode topk or threshold");
  check_that(pool == "query" || pool == "head" || pool == "all" || (pool == "block" && mode == "threshold"), op,
             "pool query, head, all, or block with threshold");
  check_that(top_k >= 1 && top_k <= std::max<int64_t>(s.chunks, 1), op, "top_k in [1, chunks]");
  Tensor mask = torch::stable::new_empty(q, {s.batch, s.chunks, s.heads, s.length}, ScalarType::Bool);
  const Scratch all(s.pairs() * s.chunks * s.length);
  if (q.scalar_type() == ScalarType::Float) gates<float>(s, q, k, all);
  else if (q.scalar_type() == ScalarType::BFloat16) gates<BFloat16>(s, q, k, all);
  else if (q.scalar_type() == ScalarType::Double) gates<double>(s, q, k, all);
  else check_that(false, op, "float32, bfloat16 or float64");
  auto* bytes = static_cast<uint8_t*>(mask.mutable_data_ptr());
  std::vector<int32_t> chunk(s.length);
  for (int64_t c = 0; c < s.chunks; ++c)
    for (int64_t j = s.bounds[c]; j < s.bounds[c + 1]; ++j) chunk[s.order[j]] = int32_t(c);
  const int64_t per_sample = s.chunks * s.heads * s.length;
  const int64_t per_row = pool == "query" ? 1 : pool == "head" ? s.length : s.heads * s.length;
  const Choice choice{mode == "topk", (top_k - 1) * per_row, threshold};
  if (pool == "query") {
    torch::stable::parallel_for(0, s.pairs() * s.length, 64, [&](int64_t begin, int64_t end) {
      std::vector<uint64_t> keys;
      for (int64_t i = begin; i < end;) {
        const int64_t pair = i / s.length, token = i % s.length;
        uint8_t* mask_of = bytes + pair / s.heads * per_sample + pair % s.heads * s.length + token;
        const Query query{all + pair * s.chunks * s.length + token, mask_of, s.chunks, chunk[token], s.length,
                          s.heads * s.length};
        if (choice.topk && choice.count <= kFewPlaces && i + kVec <= end && token + kVec <= s.length) {
          choose_lanes(query, &chunk[token], choice.count);
          i += kVec;
        } else {
          query.choose(choice, keys);
          ++i;
        }
      }
    });
    return mask;
  }
  const int64_t pools = pool == "block" ? s.chunks : pool == "head" ? s.heads : 1;
  torch::stable::parallel_for(0, s.batch * pools, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / pools, n = i % pools;
      Pool p{s, all + b * per_sample, chunk, 0, s.chunks, 0, s.heads};
      if (pool == "block") p.c0 = n, p.c1 = n + 1;
      if (pool == "head") p.h0 = n, p.h1 = n + 1;
      choose_pool(p, choice, bytes + b * per_sample);
    }
  });
  return mask;
}

}  // namespace vmoba

void register_vmoba_select(torch::stable::detail::StableLibrary& m) {
  m.impl("vmoba_select", TORCH_BOX(&vmoba::vmoba_select));
}

}  // namespace triskele::TRISKELE_LEVEL
