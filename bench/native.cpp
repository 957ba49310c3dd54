// What the benches measure against, apart from other libraries: the rate at which memory can be
// read, the rate of vpdpbusd, and the usual AVX2 loop over 8-bit integers. Built by harness.py with
// -march=native; no part of the package.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

extern "C" {

// Reads `bytes` bytes at rising addresses, a whole number of 256, asking for lines 2 KB ahead.
int read_bytes(const void* from, int64_t bytes) {
  const char* p = static_cast<const char*>(from);
  __m256i sum = _mm256_setzero_si256();
  for (int64_t i = 0; i + 256 <= bytes; i += 256) {
    for (int64_t line = 0; line < 256; line += 64) {
      _mm_prefetch(p + i + line + 2048, _MM_HINT_T0);
      sum = _mm256_xor_si256(sum, _mm256_loadu_si256((const __m256i*)(p + i + line)));
      sum = _mm256_xor_si256(sum, _mm256_loadu_si256((const __m256i*)(p + i + line + 32)));
    }
  }
  return _mm256_extract_epi32(sum, 0);
}

// `steps` times 24 independent vpdpbusd on zmm registers. Returns 0 if there are none.
int vnni_loop(int64_t steps) {
#if defined(__AVX512VNNI__)
  __m512i one = _mm512_set1_epi32(1);
#define EACH(f)                                                                               \
  f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11) f(12) f(13) f(14) f(15) f(16) \
      f(17) f(18) f(19) f(20) f(21) f(22) f(23)
#define START(i) __m512i sum##i = one;
#define STEP(i) asm("vpdpbusd %1, %1, %0" : "+v"(sum##i) : "v"(one));
#define USE(i) one = _mm512_xor_si512(one, sum##i);
  EACH(START)
  for (int64_t step = 0; step < steps; ++step) {
    EACH(STEP)
  }
  EACH(USE)
  volatile int keep = _mm512_cvtsi512_si32(one);
  (void)keep;
  return 1;
#else
  return 0;
#endif
}

// The usual AVX2 product of 8-bit integers: vpmaddubsw to 16 bits, vpmaddwd by ones to 32, vpaddd.
// Nothing else is in the loop: weights are ready to use, u8 [N / 16][K / 4][16][4], activations
// packed before, s8 [M / 4][K / 4][4][4], sums left as they are, i32 [M][N]. The 4 x 16 tile is the
// best that 16 registers hold. M % 4 == 0, blocks of 16 outputs [begin, end).
void int8_maddubs(const uint8_t* w, const int8_t* x, int32_t* out, int64_t m, int64_t n, int64_t k,
                  int64_t begin, int64_t end) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t block = begin; block < end; ++block) {
    for (int64_t row = 0; row < m; row += 4) {
      const uint8_t* wp = w + block * 16 * k;
      const int8_t* xp = x + row * k;
      __m256i s00 = _mm256_setzero_si256(), s01 = s00, s10 = s00, s11 = s00;
      __m256i s20 = s00, s21 = s00, s30 = s00, s31 = s00;
      for (int64_t quad = 0; quad < k / 4; ++quad, wp += 64, xp += 16) {
        _mm_prefetch((const char*)(wp + 2048), _MM_HINT_T0);
        const __m256i w0 = _mm256_loadu_si256((const __m256i*)wp);
        const __m256i w1 = _mm256_loadu_si256((const __m256i*)(wp + 32));
        auto row_step = [&](int r, __m256i& s0, __m256i& s1) {
          int32_t codes;
          std::memcpy(&codes, xp + 4 * r, 4);
          const __m256i q = _mm256_set1_epi32(codes);
          s0 = _mm256_add_epi32(s0, _mm256_madd_epi16(_mm256_maddubs_epi16(w0, q), ones));
          s1 = _mm256_add_epi32(s1, _mm256_madd_epi16(_mm256_maddubs_epi16(w1, q), ones));
        };
        row_step(0, s00, s01);
        row_step(1, s10, s11);
        row_step(2, s20, s21);
        row_step(3, s30, s31);
      }
      auto store = [&](int r, __m256i s0, __m256i s1) {
        int32_t* at = out + (row + r) * n + block * 16;
        _mm256_storeu_si256((__m256i*)at, s0);
        _mm256_storeu_si256((__m256i*)(at + 8), s1);
      };
      store(0, s00, s01);
      store(1, s10, s11);
      store(2, s20, s21);
      store(3, s30, s31);
    }
  }
}

}  // extern "C"
