// GELU of 16 float32 sums, the end of a 4-bit linear that asks for it: y = x Phi(x), by erf or by the tanh formula.
//
// The error is a few float32 ulp of y itself, also where y is tiny: the tail is computed as what it is and not as one
// minus nearly one. With 2^w = mantissa 2^n, w <= 0 taken in double (an exponent's error grows by its size),
//
//   erf    Phi(-t) = 2^w P(q) / (t + 3),  w = -t^2/2 log2 e,  q = (t - 3) / (t + 3),  t = |x|
//   tanh   x / (1 + 2^w) where x > 0, x 2^w / (1 + 2^w) elsewhere,  w = -2 sqrt(2/pi) (t + 0.044715 t^3) log2 e
//
// NaN gives NaN, infinity itself, -0 itself; -infinity gives NaN as torch's does.
#pragma once

namespace triskele::TRISKELE_LEVEL::svdq {

enum Epilogue : int64_t { kNone, kGelu, kGeluTanh };  // as triskele.ops.svdq.reference.EPILOGUES counts them

typedef double Doubles __attribute__((vector_size(64)));
typedef float HalfFloats __attribute__((vector_size(32)));

// w of 8 lanes -> the nearest integer, in `w` what is left. -254 times 2 is as good as minus infinity.
template <bool Tanh>
inline Doubles split_exponent(const Doubles& t, Doubles& w) {
  constexpr double shift = 6755399441055744.0;  // 1.5 * 2^52: adding it leaves the nearest integer
  const Doubles square = t * t;
  if constexpr (Tanh) w = t * (square * -0.1029432395800235 - 2.302208198144325);
  else w = square * -0.7213475204444817;
  w = w < -254.0 ? Doubles{} - 254.0 : w;
  const Doubles n = (w + shift) - shift;
  w -= n;
  return n;
}

// 2^w = mantissa * first * second for t >= 0; the factors are zero below 2^-252.
struct Power {
  Floats mantissa, first, second;
};

template <bool Tanh>
inline Power power(const Floats& t) {
  Floats whole, rest;
#if defined(__AVX512F__)
  constexpr __mmask8 all = 0xff;  // masks nothing: GCC 12 warns of its own header's unmasked forms
  Doubles low = (Doubles)_mm512_maskz_cvtps_pd(all, _mm512_maskz_extractf32x8_ps(all, (__m512)t, 0)), low_rest;
  Doubles high = (Doubles)_mm512_maskz_cvtps_pd(all, _mm512_maskz_extractf32x8_ps(all, (__m512)t, 1)), high_rest;
  low = split_exponent<Tanh>(low, low_rest), high = split_exponent<Tanh>(high, high_rest);
  const auto joined = [](const Doubles& a, const Doubles& b) {
    return (Floats)_mm512_maskz_insertf32x8(0xffff, _mm512_castps256_ps512(_mm512_maskz_cvtpd_ps(all, (__m512d)a)),
                                            _mm512_maskz_cvtpd_ps(all, (__m512d)b), 1);
  };
  whole = joined(low, high), rest = joined(low_rest, high_rest);
#else
  for (int half = 0; half < 2; ++half) {
    HalfFloats part;
    std::memcpy(&part, reinterpret_cast<const char*>(&t) + 32 * half, 32);
    Doubles left;
    const Doubles n_wide = split_exponent<Tanh>(__builtin_convertvector(part, Doubles), left);
    const HalfFloats n = __builtin_convertvector(n_wide, HalfFloats);
    part = __builtin_convertvector(left, HalfFloats);
    std::memcpy(reinterpret_cast<char*>(&whole) + 32 * half, &n, 32);
    std::memcpy(reinterpret_cast<char*>(&rest) + 32 * half, &part, 32);
  }
#endif
  Floats p = rest * 1.53533619e-4f + 1.33988744e-3f;  // minimax of 2^rest, |rest| <= 1/2, relative error 2e-9
  p = p * rest + 9.61843736e-3f;
  p = p * rest + 5.55033247e-2f;
  p = p * rest + 2.40226479e-1f;
  p = p * rest + 6.93147203e-1f;
  p = p * rest + 1.0f;
  const Ints n = (Ints)(whole + 12582912.0f) - 0x4B400000;  // 1.5 * 2^23 leaves the integer in the low bits
  const Ints half = n >> 1;
  return {p, (Floats)((half + 127) << 23), (Floats)((n - half + 127) << 23)};
}

// In place, as functions of their own: their registers are not taken from the sums of whoever calls.
__attribute__((noinline)) inline void gelu(Floats& y) {
  const Floats x = y;
  const Ints negative = (Ints)x < 0;
  const Floats t = (Floats)((Ints)x & 0x7fffffff);
  const Power e = power<false>(t);
  const Floats r = 1.0f / (t + 3.0f), q = 1.0f - 6.0f * r;  // of infinity: 0 and 1
  Floats tail = q * 5.40445981e-05f + 0.000130801665f;  // Phi(-t) (t + 3) / 2^w, relative error 4e-8
  tail = tail * q - 0.000244168768f;
  tail = tail * q - 0.00103186467f;
  tail = tail * q + 0.00102450792f;
  tail = tail * q + 0.00696899509f;
  tail = tail * q - 0.0104624666f;
  tail = tail * q - 0.0472626351f;
  tail = tail * q + 0.230017692f;
  tail = tail * q - 0.509332001f;
  tail = tail * q + 0.729083717f;
  tail = tail * r * e.mantissa;
  const Floats above = x * (1.0f - tail * e.first * e.second), below = x * tail * e.first * e.second;
  y = negative ? below : above;
}

__attribute__((noinline)) inline void gelu_tanh(Floats& y) {
  const Floats x = y;
  const Ints negative = (Ints)x < 0;
  const Power e = power<true>((Floats)((Ints)x & 0x7fffffff));
  const Floats one = 1.0f - Floats{};
  y = (negative ? x * e.mantissa : x) / (1.0f + e.mantissa * e.first * e.second);
  y = y * (negative ? e.first : one) * (negative ? e.second : one);
}

inline Floats activated(int64_t epilogue, const Floats& y) {
  if (epilogue == kNone) return y;
  Floats out = y;
  if (epilogue == kGelu) gelu(out);
  else gelu_tanh(out);
  return out;
}

}  // namespace triskele::TRISKELE_LEVEL::svdq
