#include "model/safetensors.h"

#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <random>
#include <string>

namespace msa::model {
namespace {

// A file of a header and `data_bytes` bytes of random data.
std::vector<std::byte> file_of(const std::string& header, size_t data_bytes) {
  std::vector<std::byte> file(8 + header.size() + data_bytes);
  const uint64_t length = header.size();
  for (size_t i = 0; i < 8; ++i) file[i] = static_cast<std::byte>(length >> (8 * i));
  std::memcpy(file.data() + 8, header.data(), header.size());
  std::mt19937 random(1);
  for (size_t i = 8 + header.size(); i < file.size(); ++i)
    file[i] = static_cast<std::byte>(random());
  return file;
}

std::string error_of(const std::string& header, size_t data_bytes) {
  std::vector<TensorEntry> entries;
  return parse_safetensors(file_of(header, data_bytes), &entries).message();
}

void expect_error(const std::string& header, size_t data_bytes, const std::string& part) {
  const std::string message = error_of(header, data_bytes);
  EXPECT_NE(message.find(part), std::string::npos) << header << "\n  gave: " << message;
}

constexpr const char* kTwo =
    R"({"__metadata__":{"who":"me"},"b":{"dtype":"BF16","shape":[3],"data_offsets":[24,30]},)"
    R"("a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}})";

TEST(Safetensors, ReadsEntriesInTheOrderOfTheData) {
  const auto file = file_of(kTwo, 30);
  std::vector<TensorEntry> entries;
  Metadata metadata;
  ASSERT_TRUE(parse_safetensors(file, &entries, &metadata).ok());
  ASSERT_EQ(entries.size(), 2u);
  EXPECT_EQ(entries[0].name, "a");
  EXPECT_EQ(entries[0].shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(entries[0].bytes.size(), 24u);
  EXPECT_EQ(entries[1].name, "b");
  EXPECT_EQ(entries[1].dtype, "BF16");
  EXPECT_EQ(entries[1].bytes.data(), entries[0].bytes.data() + 24);
  EXPECT_EQ(metadata.at("who"), "me");
}

TEST(Safetensors, HolesAndEmptyTensorsAreLegal) {
  EXPECT_EQ(error_of(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[8,12]},)"
                     R"("e":{"dtype":"F32","shape":[0,7],"data_offsets":[12,12]},)"
                     R"("c":{"dtype":"I64","shape":[],"data_offsets":[16,24]}})",
                     40),
            "");
  EXPECT_EQ(error_of("{}", 0), "");
}

TEST(Safetensors, TruncationAtEveryByteIsAnError) {
  const auto file = file_of(kTwo, 30);
  for (size_t size = 0; size < file.size(); ++size) {
    // A copy of the exact size, so that a sanitizer sees a read behind its end.
    const std::vector<std::byte> cut(file.begin(), file.begin() + static_cast<ptrdiff_t>(size));
    std::vector<TensorEntry> entries;
    EXPECT_FALSE(parse_safetensors(cut, &entries).ok()) << size;
  }
}

TEST(Safetensors, BadHeadersAreNamed) {
  expect_error("[1,2]", 0, "expected a JSON object");
  expect_error("{\"a\":", 0, "not valid JSON");
  expect_error(R"({"a":{"x":{"y":{"z":{}}}}})", 0, "nested deeper");
  expect_error(R"({"__metadata__":{"n":1}})", 0, "not a string");
  expect_error(R"({"a":7})", 0, "tensor a: expected an object");
  expect_error(R"({"a":{"dtype":"F32","shape":[1]}})", 4, "data_offsets");
  expect_error(R"({"a":{"dtype":"F33","shape":[1],"data_offsets":[0,4]}})", 4, "F33");
  expect_error(R"({"a":{"dtype":3,"shape":[1],"data_offsets":[0,4]}})", 4, "dtype: got 3");
  std::vector<std::byte> huge = file_of("{}", 0);
  for (size_t i = 0; i < 8; ++i) huge[i] = std::byte{0xff};
  std::vector<TensorEntry> entries;
  EXPECT_NE(parse_safetensors(huge, &entries).message().find("header length"), std::string::npos);
}

TEST(Safetensors, BadRangesAreNamed) {
  const auto with = [](const std::string& shape, const std::string& range) {
    return R"({"a":{"dtype":"F32","shape":)" + shape + R"(,"data_offsets":)" + range + "}}";
  };
  expect_error(with("[1]", "[4,0]"), 8, "expected [begin, end]");
  expect_error(with("[1]", "[0]"), 8, "expected [begin, end]");
  expect_error(with("[1]", "[-4,0]"), 8, "expected [begin, end]");
  expect_error(with("[1]", "[0,4.0]"), 8, "expected [begin, end]");
  expect_error(with("[1]", "[8,12]"), 8, "the file holds 8 bytes");
  expect_error(with("[1]", "[0,18446744073709551615]"), 8, "data_offsets");
  expect_error(with("[3]", "[0,8]"), 8, "got 8 bytes, but F32 [3] takes 12");
  expect_error(with("[-1]", "[0,8]"), 8, "expected extents >= 0");
  expect_error(with("{}", "[0,8]"), 8, "expected a list");
  expect_error(with("[4611686018427387904,4]", "[0,8]"), 8, "overflows");
  expect_error(with("[9223372036854775808]", "[0,8]"), 8, "expected extents >= 0");
}

TEST(Safetensors, DuplicateAndOverlappingEntriesAreNamed) {
  const std::string a = R"("a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]})";
  expect_error("{" + a + "," + a + "}", 8, "tensor a: named twice");
  expect_error("{" + a + R"(,"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}})", 12,
               "tensor b: its bytes overlap those of a");
  expect_error("{" + a + R"(,"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 12,
               "overlap");
}

TEST(Safetensors, IntegersOfBothWidths) {
  const std::string header = R"({"i":{"dtype":"I32","shape":[2],"data_offsets":[0,8]},)"
                             R"("l":{"dtype":"I64","shape":[2],"data_offsets":[8,24]},)"
                             R"("f":{"dtype":"F32","shape":[1],"data_offsets":[24,28]}})";
  auto file = file_of(header, 28);
  std::byte* data = file.data() + 8 + header.size();
  const int32_t narrow[2] = {-5, 70000};
  int64_t wide[2] = {-6, 2147483647};
  std::memcpy(data, narrow, 8);
  std::memcpy(data + 8, wide, 16);
  std::vector<TensorEntry> entries;
  ASSERT_TRUE(parse_safetensors(file, &entries).ok());
  std::vector<int32_t> values;
  ASSERT_TRUE(read_int32(entries[0], &values).ok());
  EXPECT_EQ(values, (std::vector<int32_t>{-5, 70000}));
  ASSERT_TRUE(read_int32(entries[1], &values).ok());
  EXPECT_EQ(values, (std::vector<int32_t>{-6, 2147483647}));
  EXPECT_NE(read_int32(entries[2], &values).message().find("got F32"), std::string::npos);
  wide[1] = 2147483648;
  std::memcpy(data + 8, wide, 16);
  EXPECT_NE(read_int32(entries[1], &values).message().find("element 1: got 2147483648"),
            std::string::npos);
}

class SafetensorsFileTest : public testing::Test {
 protected:
  void SetUp() override { std::filesystem::create_directories(folder_); }
  void TearDown() override { std::filesystem::remove_all(folder_); }
  std::filesystem::path folder_ =
      std::filesystem::path(testing::TempDir()) / "msa_safetensors_test";
};

TEST_F(SafetensorsFileTest, WhatIsWrittenIsReadBack) {
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  std::vector<float> floats(24);
  for (float& value : floats) value = normal(random);
  std::vector<uint16_t> halves(5);
  for (uint16_t& value : halves) value = static_cast<uint16_t>(random());
  const std::vector<std::pair<std::string, TensorView>> tensors{
      {"halves", TensorView::contiguous(halves.data(), DType::kBF16, {5})},
      {"floats", TensorView::contiguous(floats.data(), DType::kF32, {2, 3, 4})}};
  const auto path = folder_ / "out.safetensors";
  std::FILE* stream = std::fopen(path.c_str(), "wb");
  ASSERT_NE(stream, nullptr);
  EXPECT_EQ(write_safetensors(stream, tensors, {{"made", "here"}}).message(), "");
  ASSERT_EQ(std::fclose(stream), 0);

  SafetensorsFile file;
  ASSERT_EQ(SafetensorsFile::open(path, &file).message(), "");
  EXPECT_EQ(file.metadata.at("made"), "here");
  const TensorEntry* entry = file.find("halves");
  ASSERT_NE(entry, nullptr);
  EXPECT_EQ(std::memcmp(entry->bytes.data(), halves.data(), 10), 0);
  // Ten bytes in front of it leave the floats unaligned: readable as bytes, not as a view.
  TensorView view;
  EXPECT_NE(file.view("floats", &view).message().find("not aligned"), std::string::npos);
  EXPECT_EQ(std::memcmp(file.find("floats")->bytes.data(), floats.data(), 96), 0);
  ASSERT_TRUE(file.view("halves", &view).ok());
  EXPECT_EQ(view.dtype, DType::kBF16);
  EXPECT_EQ(view.shape[0], 5);
  EXPECT_NE(file.view("others", &view).message().find("others: not in the file"),
            std::string::npos);
}

TEST_F(SafetensorsFileTest, AStreamThatTakesNoBytesIsAnError) {
  std::FILE* full = std::fopen("/dev/full", "wb");
  ASSERT_NE(full, nullptr);
  const std::vector<float> many(1 << 16);
  const std::vector<std::pair<std::string, TensorView>> tensors{
      {"x", TensorView::contiguous(many.data(), DType::kF32, {1 << 16})}};
  const Status status = write_safetensors(full, tensors);
  EXPECT_EQ(status.code(), StatusCode::kIo);
  EXPECT_EQ(status.message(), "No space left on device");
  std::fclose(full);
}

TEST_F(SafetensorsFileTest, FilesThatCannotBeOpenedAreNamed) {
  SafetensorsFile file;
  const Status missing = SafetensorsFile::open(folder_ / "none.safetensors", &file);
  EXPECT_EQ(missing.code(), StatusCode::kIo);
  EXPECT_NE(missing.message().find("none.safetensors"), std::string::npos);
  EXPECT_NE(SafetensorsFile::open(folder_, &file).message().find("not a regular file"),
            std::string::npos);
}

}  // namespace
}  // namespace msa::model
