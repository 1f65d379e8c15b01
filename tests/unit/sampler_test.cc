#include "model/sampler.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>

namespace msa::model {
namespace {

Sampler make(const SamplerOptions& options) {
  Sampler sampler;
  EXPECT_EQ(Sampler::create(options, &sampler).message(), "");
  return sampler;
}

// ln of the probabilities 0.1, 0.4, 0.2, 0.3.
const std::vector<float> kLogits{std::log(0.1f), std::log(0.4f), std::log(0.2f), std::log(0.3f)};

std::map<int32_t, double> shares(const SamplerOptions& options, int draws = 20000) {
  Sampler sampler = make(options);
  std::map<int32_t, double> counts;
  for (int i = 0; i < draws; ++i) counts[sampler.sample(kLogits)] += 1.0 / draws;
  return counts;
}

TEST(SamplerTest, GreedyTakesTheBestAndTheLowerOfTwo) {
  Sampler sampler = make({});
  EXPECT_EQ(sampler.sample(kLogits), 1);
  const std::vector<float> tie{0.5f, 2.0f, -1.0f, 2.0f};
  EXPECT_EQ(sampler.sample(tie), 1);
}

TEST(SamplerTest, DrawsFollowTheProbabilities) {
  const auto found = shares({.temperature = 1, .seed = 5});
  EXPECT_NEAR(found.at(0), 0.1, 0.01);
  EXPECT_NEAR(found.at(1), 0.4, 0.015);
  EXPECT_NEAR(found.at(2), 0.2, 0.015);
  EXPECT_NEAR(found.at(3), 0.3, 0.015);
  // At temperature 1/2 probabilities are squared: 1, 16, 4, 9 of 30.
  EXPECT_NEAR(shares({.temperature = 0.5f, .seed = 6}).at(1), 16.0 / 30, 0.015);
}

TEST(SamplerTest, TopKAndTopPCutTheTail) {
  const auto two = shares({.temperature = 1, .top_k = 2, .seed = 7});
  EXPECT_EQ(two.size(), 2u);
  EXPECT_NEAR(two.at(1), 4.0 / 7, 0.015);
  const auto nucleus = shares({.temperature = 1, .top_p = 0.65f, .seed = 8});
  EXPECT_EQ(nucleus.size(), 2u);  // 0.4 + 0.3 reaches 0.65
  EXPECT_EQ(shares({.temperature = 1, .top_p = 1e-6f, .seed = 9}).size(), 1u);
}

TEST(SamplerTest, ASeedRepeatsAndSeedsDiffer) {
  Sampler a = make({.temperature = 1, .seed = 42}), b = make({.temperature = 1, .seed = 42});
  Sampler c = make({.temperature = 1, .seed = 43});
  int different = 0;
  for (int i = 0; i < 100; ++i) {
    const int32_t token = a.sample(kLogits);
    EXPECT_EQ(token, b.sample(kLogits));
    different += token != c.sample(kLogits);
  }
  EXPECT_GT(different, 20);
}

TEST(SamplerTest, StrangeLogitsChooseAValidToken) {
  const float nan = std::nanf(""), inf = std::numeric_limits<float>::infinity();
  Sampler sampler = make({.temperature = 1, .seed = 3});
  EXPECT_EQ(sampler.sample(std::vector<float>{nan, 1.0f, nan}), 1);
  EXPECT_EQ(sampler.sample(std::vector<float>{-inf, -inf, 0.5f}), 2);
  EXPECT_EQ(sampler.sample(std::vector<float>{0.5f, inf, 1.0f}), 1);
  const int32_t any = sampler.sample(std::vector<float>{-inf, -inf});
  EXPECT_TRUE(any == 0 || any == 1);
}

TEST(SamplerTest, BadOptionsAreNamed) {
  Sampler sampler;
  const auto message = [&](const SamplerOptions& options) {
    return Sampler::create(options, &sampler).message();
  };
  EXPECT_NE(message({.temperature = -1}).find("temperature: got -1"), std::string::npos);
  EXPECT_NE(message({.temperature = std::nanf("")}).find("temperature"), std::string::npos);
  EXPECT_NE(message({.top_k = -2}).find("top_k: got -2"), std::string::npos);
  EXPECT_NE(message({.top_p = 0}).find("top_p: got 0"), std::string::npos);
  EXPECT_NE(message({.top_p = 1.5f}).find("top_p: got 1.5"), std::string::npos);
}

}  // namespace
}  // namespace msa::model
