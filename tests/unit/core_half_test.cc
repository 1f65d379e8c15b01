// Conversions of the 16-bit floats, all 65536 of each.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "core/half.h"

namespace msa {
namespace {

constexpr uint32_t kAll = 1u << 16;

/// The number that sign, exponent and mantissa of an IEEE format mean.
double meaning(uint32_t bits, int exponent_bits, int mantissa_bits) {
  const int sign = (bits >> 15) & 1;
  const int exponent = static_cast<int>(bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int mantissa = static_cast<int>(bits) & ((1 << mantissa_bits) - 1);
  const int bias = (1 << (exponent_bits - 1)) - 1;
  double value = 0;
  if (exponent == (1 << exponent_bits) - 1) {
    value = mantissa == 0 ? std::numeric_limits<double>::infinity()
                          : std::numeric_limits<double>::quiet_NaN();
  } else if (exponent == 0) {
    value = std::ldexp(mantissa, 1 - bias - mantissa_bits);
  } else {
    value = std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
  }
  return sign != 0 ? -value : value;
}

template <class ToFloat, class FromFloat>
void check_all(int exponent_bits, int mantissa_bits, ToFloat to_float, FromFloat from_float) {
  for (uint32_t bits = 0; bits < kAll; ++bits) {
    const float value = to_float(static_cast<uint16_t>(bits));
    const double expected = meaning(bits, exponent_bits, mantissa_bits);
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(value)) << bits;
      ASSERT_TRUE(std::isnan(to_float(from_float(value)))) << bits;
      continue;
    }
    ASSERT_EQ(static_cast<double>(value), expected) << bits;
    ASSERT_EQ(std::signbit(value), std::signbit(expected)) << bits;
    ASSERT_EQ(from_float(value), bits);
  }
}

TEST(Half, BF16MeansWhatIeeeSaysAndRoundTrips) { check_all(8, 7, bf16_to_f32, f32_to_bf16); }
TEST(Half, F16MeansWhatIeeeSaysAndRoundTrips) { check_all(5, 10, f16_to_f32, f32_to_f16); }

/// Numbers between neighbours go to the nearer one, and to the even one from the middle.
template <class ToFloat, class FromFloat>
void check_rounding(uint16_t infinity, ToFloat to_float, FromFloat from_float) {
  for (uint32_t bits = 0; bits + 1 < infinity; ++bits) {
    const uint16_t low = static_cast<uint16_t>(bits), high = static_cast<uint16_t>(bits + 1);
    const float a = to_float(low), b = to_float(high);
    const float middle = static_cast<float>((static_cast<double>(a) + static_cast<double>(b)) / 2);
    ASSERT_EQ(from_float(middle), bits % 2 == 0 ? low : high) << bits;
    ASSERT_EQ(from_float(std::nextafterf(middle, 0.0f)), low) << bits;
    ASSERT_EQ(from_float(std::nextafterf(middle, b)), high) << bits;
    ASSERT_EQ(from_float(-middle), 0x8000u | from_float(middle)) << bits;
  }
  EXPECT_EQ(from_float(std::numeric_limits<float>::infinity()), infinity);
  EXPECT_EQ(from_float(std::numeric_limits<float>::max()), infinity);
}

TEST(Half, BF16RoundsToNearestEven) { check_rounding(0x7f80, bf16_to_f32, f32_to_bf16); }
TEST(Half, F16RoundsToNearestEven) {
  check_rounding(0x7c00, f16_to_f32, f32_to_f16);
  EXPECT_EQ(f32_to_f16(65519.99f), 0x7bff);  // the last number that does not become infinite
  EXPECT_EQ(f32_to_f16(65520.0f), 0x7c00);
}

TEST(Half, LoadAndStoreByDType) {
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    uint32_t memory[4] = {};
    for (int64_t i = 0; i < 4; ++i) store_f32(memory, dtype, i, static_cast<float>(i) - 1.5f);
    for (int64_t i = 0; i < 4; ++i)
      EXPECT_EQ(load_f32(memory, dtype, i), static_cast<float>(i) - 1.5f) << name_of(dtype);
  }
}

}  // namespace
}  // namespace msa
