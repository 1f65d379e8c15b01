#include "model/tokens.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <string>

namespace msa::model {
namespace {

std::vector<std::byte> npy(const std::string& dictionary, const std::vector<int32_t>& ids,
                           int version = 1) {
  std::string head("\x93NUMPY");
  head += static_cast<char>(version);
  head += '\0';
  const size_t length = dictionary.size();
  for (size_t i = 0; i < (version == 1 ? 2u : 4u); ++i)
    head += static_cast<char>(length >> (8 * i) & 0xff);
  head += dictionary;
  std::vector<std::byte> file(head.size() + ids.size() * 4);
  std::memcpy(file.data(), head.data(), head.size());
  if (!ids.empty()) std::memcpy(file.data() + head.size(), ids.data(), ids.size() * 4);
  return file;
}

std::string dictionary(const std::string& descr, const std::string& shape) {
  return "{'descr': " + descr + ", 'fortran_order': False, 'shape': " + shape + ", }   \n";
}

std::vector<int32_t> random_ids(size_t count) {
  std::mt19937 random(3);
  std::vector<int32_t> ids(count);
  for (int32_t& id : ids) id = static_cast<int32_t>(random() % 200000);
  return ids;
}

void expect_error(const std::vector<std::byte>& file, const std::string& part) {
  std::vector<int32_t> out;
  const std::string message = parse_npy(file, &out).message();
  EXPECT_NE(message.find(part), std::string::npos) << "gave: " << message;
}

TEST(Tokens, ReadsNpyOfEveryVersion) {
  const auto ids = random_ids(37);
  for (int version : {1, 2, 3}) {
    std::vector<int32_t> out;
    const auto file = npy(dictionary("'<i4'", "(37,)"), ids, version);
    ASSERT_EQ(parse_npy(file, &out).message(), "");
    EXPECT_EQ(out, ids);
    ASSERT_EQ(parse_token_ids(file, &out).message(), "");
    EXPECT_EQ(out, ids);
  }
}

TEST(Tokens, TruncatedNpyIsAnErrorAtEveryByte) {
  const auto file = npy(dictionary("'<i4'", "(5,)"), random_ids(5));
  for (size_t size = 0; size < file.size(); ++size) {
    const std::vector<std::byte> cut(file.begin(), file.begin() + static_cast<ptrdiff_t>(size));
    std::vector<int32_t> out;
    EXPECT_FALSE(parse_npy(cut, &out).ok()) << size;
  }
}

TEST(Tokens, OtherArraysAreNamed) {
  const auto ids = random_ids(6);
  expect_error(npy(dictionary("'<i8'", "(3,)"), ids), "int32");
  expect_error(npy(dictionary("'>i4'", "(6,)"), ids), "int32");
  expect_error(npy(dictionary("'<i4'", "(2, 3)"), ids), "one dimension");
  expect_error(npy(dictionary("'<i4'", "()"), ids), "one dimension");
  expect_error(npy(dictionary("'<i4'", "(-6,)"), ids), "one dimension");
  expect_error(npy(dictionary("'<i4'", "(99999999999999999999,)"), ids), "one dimension");
  expect_error(npy(dictionary("'<i4'", "(7,)"), ids), "promises 7 ids, but holds 24 bytes");
  expect_error(npy(dictionary("'<i4'", "(5,)"), ids), "promises 5");
  expect_error(npy("{'shape': (6,)}", ids), "int32");
  expect_error(npy(dictionary("'<i4'", "(6,)"), ids, 4), "version: got 4");
}

TEST(Tokens, SafetensorsNeedASingleTensor) {
  const auto file = [](const std::string& header, const std::vector<int32_t>& ids) {
    std::vector<std::byte> bytes(8 + header.size() + ids.size() * 4);
    bytes[0] = static_cast<std::byte>(header.size());
    std::memcpy(bytes.data() + 8, header.data(), header.size());
    std::memcpy(bytes.data() + 8 + header.size(), ids.data(), ids.size() * 4);
    return bytes;
  };
  std::vector<int32_t> out;
  const auto ids = random_ids(2);
  ASSERT_EQ(
      parse_token_ids(file(R"({"t":{"dtype":"I32","shape":[2],"data_offsets":[0,8]}})", ids), &out)
          .message(),
      "");
  EXPECT_EQ(out, ids);
  const Status two =
      parse_token_ids(file(R"({"t":{"dtype":"I32","shape":[1],"data_offsets":[0,4]},)"
                           R"("u":{"dtype":"I32","shape":[1],"data_offsets":[4,8]}})",
                           ids),
                      &out);
  EXPECT_NE(two.message().find("got 2 tensors"), std::string::npos);
}

TEST(Tokens, TextIsItsBytes) {
  EXPECT_EQ(tokens_of("a\xff\n"), (std::vector<int32_t>{97, 255, 10}));
}

}  // namespace
}  // namespace msa::model
