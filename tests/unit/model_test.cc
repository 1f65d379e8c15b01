// The model's behaviour: chunks, decoding, threads, hooks, errors. Values are golden-tested.
#include "model/model.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <deque>
#include <fstream>
#include <functional>
#include <limits>
#include <random>
#include <utility>

#include "core/half.h"
#include "model/safetensors.h"

namespace msa::model {
namespace {

namespace fs = std::filesystem;

const fs::path kTiny = fs::path(MSA_SOURCE_DIR) / "tests/golden/tiny/module";

std::unique_ptr<Model> load(const LoadOptions& options = {}) {
  std::unique_ptr<Model> model;
  EXPECT_EQ(Model::load(kTiny, options, &model).message(), "");
  return model;
}

std::unique_ptr<Session> start(const Model& model, Attention attention, int64_t max_tokens) {
  std::unique_ptr<Session> session;
  EXPECT_EQ(Session::create(model, attention, max_tokens, &session).message(), "");
  return session;
}

std::vector<int32_t> random_tokens(size_t count) {
  std::mt19937 random(11);
  std::vector<int32_t> tokens(count);
  for (int32_t& token : tokens) token = static_cast<int32_t>(random() % 96);
  return tokens;
}

// Logits of the last token after extending piece by piece.
std::vector<float> logits_after(const Model& model, Attention attention,
                                std::span<const int32_t> tokens,
                                const std::vector<size_t>& pieces) {
  const auto session = start(model, attention, std::ssize(tokens));
  std::vector<float> logits(96);
  for (size_t piece : pieces) {
    EXPECT_EQ(session->extend(tokens.first(piece), logits).message(), "");
    tokens = tokens.subspan(piece);
  }
  EXPECT_TRUE(tokens.empty());
  return logits;
}

double distance(const std::vector<float>& a, const std::vector<float>& b) {
  double worst = 0;
  for (size_t i = 0; i < a.size(); ++i)
    worst = std::max(worst, std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i])));
  return worst;
}

TEST(ModelTest, PiecesAndDecodingGiveTheSameLogits) {
  const auto model = load();
  const auto tokens = random_tokens(150);
  for (Attention attention : {Attention::kDense, Attention::kMsa}) {
    const auto whole = logits_after(*model, attention, tokens, {150});
    EXPECT_LT(distance(whole, logits_after(*model, attention, tokens, {63, 87})), 1e-4);
    EXPECT_LT(distance(whole, logits_after(*model, attention, tokens, {140, 7, 1, 1, 1})), 1e-4);
    EXPECT_GT(distance(whole, logits_after(*model, attention, random_tokens(149), {149})), 1e-2);
  }
}

TEST(ModelTest, MoreTokensThanAChunk) {
  const auto model = load();
  const auto tokens = random_tokens(2100);  // a chunk has 2048
  const auto whole = logits_after(*model, Attention::kMsa, tokens, {2100});
  EXPECT_LT(distance(whole, logits_after(*model, Attention::kMsa, tokens, {1000, 1100})), 1e-4);
}

TEST(ModelTest, ThreadsDoNotChangeABit) {
  const auto one = load({.threads = 1}), three = load({.threads = 3});
  EXPECT_EQ(one->threads(), 1);
  EXPECT_EQ(three->threads(), 3);
  const auto tokens = random_tokens(200);
  for (Attention attention : {Attention::kDense, Attention::kMsa})
    EXPECT_EQ(logits_after(*one, attention, tokens, {190, 10}),
              logits_after(*three, attention, tokens, {190, 10}));
}

TEST(ModelTest, DenseAndMsaAgreeBelowTheSelectedBlocks) {
  const auto model = load();
  const auto tokens = random_tokens(64);  // 4 blocks of 16
  EXPECT_LT(distance(logits_after(*model, Attention::kDense, tokens, {64}),
                     logits_after(*model, Attention::kMsa, tokens, {64})),
            1e-4);
  const auto more = random_tokens(160);
  EXPECT_GT(distance(logits_after(*model, Attention::kDense, more, {160}),
                     logits_after(*model, Attention::kMsa, more, {160})),
            1e-3);
}

TEST(ModelTest, Bf16StaysNear) {
  const auto tokens = random_tokens(60);
  const auto exact = logits_after(*load(), Attention::kDense, tokens, {60});
  const auto near = logits_after(*load({.dtype = DType::kBF16}), Attention::kDense, tokens, {60});
  EXPECT_LT(distance(exact, near), 0.3);
  EXPECT_GT(distance(exact, near), 0);
}

TEST(ModelTest, HooksSeeEveryToken) {
  const auto model = load();
  const auto tokens = random_tokens(300);
  const auto session = start(*model, Attention::kMsa, 300);
  int64_t logit_rows = 0, losses = 0, progress = 0;
  std::vector<int64_t> selected(model->config().layers.size());
  double loss = 0, expected_loss = 0;
  Hooks hooks;
  hooks.on_logits = [&](int64_t first, const TensorView& logits) {
    EXPECT_EQ(first, logit_rows);
    for (int64_t i = 0; i < logits.shape[0] && first + i + 1 < 300; ++i) {
      double sum = 0;
      for (int64_t c = 0; c < 96; ++c)
        sum += std::exp(static_cast<double>(*logits.at<float>(i, c)));
      const int32_t next = tokens[static_cast<size_t>(first + i + 1)];
      expected_loss += std::log(sum) - static_cast<double>(*logits.at<float>(i, next));
    }
    logit_rows += logits.shape[0];
  };
  hooks.on_loss = [&](int64_t first, std::span<const float> nats) {
    EXPECT_EQ(first, losses + 1);
    losses += std::ssize(nats);
    for (float value : nats) loss += static_cast<double>(value);
  };
  hooks.on_selection = [&](int layer, int64_t first, const TensorView& ids) {
    EXPECT_EQ(first, selected[static_cast<size_t>(layer)]);
    selected[static_cast<size_t>(layer)] += ids.shape[1];
    for (int64_t i = 0; i < ids.shape[1]; ++i)  // the local block is always there
      EXPECT_EQ(std::count(ids.at<int32_t>(1, i), ids.at<int32_t>(1, i) + 4, (first + i) / 16), 1);
  };
  hooks.time_index = true;
  hooks.on_progress = [&](int64_t done, int64_t total) {
    EXPECT_GT(done, progress);
    EXPECT_EQ(total, 300);
    progress = done;
    return true;
  };
  ASSERT_EQ(session->extend(tokens, {}, hooks).message(), "");
  EXPECT_EQ(logit_rows, 300);
  EXPECT_EQ(losses, 299);
  EXPECT_NEAR(loss, expected_loss, 1e-3);
  EXPECT_EQ(progress, 300);
  EXPECT_EQ(selected, (std::vector<int64_t>{0, 300, 300, 300}));
  EXPECT_EQ(session->length(), 300);
  const Timings& timings = session->timings();
  EXPECT_EQ(timings.index[0], 0);
  double attention = 0;
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_GT(timings.attention[i], timings.index[i]);
    attention += timings.attention[i];
  }
  EXPECT_GT(timings.total, attention);
}

TEST(ModelTest, ForcedSelectionIsUsed) {
  const auto model = load();
  const auto tokens = random_tokens(200);
  const auto with = [&](const std::function<int32_t(int32_t local)>& choose) {
    const auto session = start(*model, Attention::kMsa, 200);
    Hooks hooks;
    hooks.force_selection = [&](int, int64_t first, const TensorView& ids) {
      for (int64_t head = 0; head < ids.shape[0]; ++head)
        for (int64_t i = 0; i < ids.shape[1]; ++i) {
          int32_t* list = ids.at<int32_t>(head, i);
          const auto local = static_cast<int32_t>((first + i) / 16);
          std::fill_n(list, 4, -1);
          list[0] = local;
          if (const int32_t other = choose(local); other != local) list[1] = other;
        }
    };
    std::vector<float> logits(96);
    EXPECT_EQ(session->extend(tokens, logits, hooks).message(), "");
    return logits;
  };
  const auto first_block = with([](int32_t) { return 0; });
  EXPECT_EQ(first_block, with([](int32_t) { return 0; }));
  EXPECT_NE(first_block, with([](int32_t local) { return local / 2; }));
}

TEST(ModelTest, ALayerIsItsTwoSteps) {
  const auto model = load();
  const auto tokens = random_tokens(200);
  std::vector<float> logits[2];
  for (bool apart : {false, true}) {
    const auto session = start(*model, Attention::kMsa, 200);
    Hooks hooks;
    hooks.time_index = apart;
    for (size_t first = 0, count = 180; first < 200; first += count, count = 4) {
      logits[apart].resize(96);
      const auto part = std::span(tokens).subspan(first, count);
      ASSERT_EQ(session->extend(part, logits[apart], hooks).message(), "");
    }
    EXPECT_EQ(session->timings().index[1] > 0, apart);
  }
  EXPECT_EQ(logits[0], logits[1]);
}

TEST(ModelTest, KeptMassGrowsWithTheBlocks) {
  const auto tokens = random_tokens(512);
  std::vector<double> before(3, 0.0);
  for (int32_t topk : {1, 4, 16, 28}) {
    const auto model = load({.topk = topk});
    EXPECT_EQ(model->config().topk, topk);
    const auto session = start(*model, Attention::kMsa, 512);
    Hooks hooks;
    hooks.kept_mass = true;
    ASSERT_EQ(session->extend(tokens, {}, hooks).message(), "");
    const std::vector<double> mass = session->kept_mass();
    ASSERT_EQ(mass.size(), 3u);
    EXPECT_GT(mass[0], before[0]);  // the first sparse layer has the same inputs for every K
    for (double value : mass) EXPECT_LT(value, 1 + 1e-5);
    before = mass;
  }
  EXPECT_GT(before[0], 0.8);
  const auto all = load({.topk = 32});
  const auto session = start(*all, Attention::kMsa, 512);
  Hooks hooks;
  hooks.kept_mass = true;
  ASSERT_EQ(session->extend(tokens, {}, hooks).message(), "");
  EXPECT_TRUE(session->kept_mass().empty());  // no query sees more than K blocks
}

TEST(ModelTest, BadCallsAreNamedAndChangeNothing) {
  const auto model = load();
  const auto session = start(*model, Attention::kMsa, 40);
  auto tokens = random_tokens(30);
  std::vector<float> logits(96);
  ASSERT_EQ(session->extend(tokens, logits).message(), "");
  const auto expect = [&](const Status& status, const std::string& part) {
    EXPECT_NE(status.message().find(part), std::string::npos) << status.message();
    EXPECT_EQ(session->length(), 30);
  };
  expect(session->extend(random_tokens(11), logits), "the cache of 40 holds 30 already");
  tokens.resize(5);
  tokens[3] = 96;
  expect(session->extend(tokens, logits),
         "tokens[3]: got 96, expected an id below vocab_size (96)");
  tokens[3] = -1;
  expect(session->extend(tokens, logits), "tokens[3]: got -1");
  tokens[3] = 5;
  std::vector<float> wrong(95);
  expect(session->extend(tokens, wrong), "logits_last: got 95");
  Hooks hooks;
  hooks.on_progress = [](int64_t, int64_t) { return false; };
  expect(session->extend(tokens, logits, hooks), "interrupted");
  ASSERT_EQ(session->extend(tokens, logits).message(), "");
  EXPECT_EQ(session->length(), 35);
  std::unique_ptr<Session> none;
  EXPECT_NE(Session::create(*model, Attention::kMsa, 0, &none).message().find("got 0"),
            std::string::npos);
}

TEST(ModelTest, BadOptionsAreNamed) {
  std::unique_ptr<Model> model;
  const auto message = [&](const LoadOptions& options) {
    return Model::load(kTiny, options, &model).message();
  };
  EXPECT_NE(message({.dtype = DType::kF16}).find("supported are f32 and bf16"), std::string::npos);
  EXPECT_NE(message({.backend = "gpu9"}).find("gpu9"), std::string::npos);
  EXPECT_NE(message({.topk = -3}).find("index_topk_blocks: got -3"), std::string::npos);
}

// A copy of the tiny checkpoint with one tensor changed.
class BrokenCheckpoint : public testing::Test {
 protected:
  using Tensors = std::vector<std::pair<std::string, TensorView>>;

  void SetUp() override {
    fs::remove_all(folder_);
    fs::create_directories(folder_);
    fs::copy(kTiny / "config.json", folder_);
    ASSERT_EQ(SafetensorsFile::open(kTiny / "model.safetensors", &file_).message(), "");
    for (const TensorEntry& entry : file_.entries) {
      TensorView view;
      ASSERT_EQ(file_.view(entry.name, &view).message(), "");
      tensors_.emplace_back(entry.name, view);
    }
  }
  void TearDown() override { fs::remove_all(folder_); }

  TensorView& tensor(const std::string& name) {
    for (auto& [key, view] : tensors_)
      if (key == name) return view;
    ADD_FAILURE() << name;
    return tensors_[0].second;
  }

  std::string load_message() {
    std::unique_ptr<Model> model;
    return Model::load(folder_, {}, &model).message();
  }
  // A tensor as f32 values that the test may change.
  std::span<float> own(const std::string& name) {
    TensorView& view = tensor(name);
    std::vector<float>& values = owned_.emplace_back(view.numel());
    for (int64_t i = 0; i < view.numel(); ++i)
      values[static_cast<size_t>(i)] = load_f32(view.data, view.dtype, i);
    view.data = values.data();
    view.dtype = DType::kF32;
    return values;
  }
  // What extending the written model by `pieces` of tokens ends with.
  Status run(std::span<const int32_t> tokens, size_t piece, const LoadOptions& options = {}) {
    std::unique_ptr<Model> model;
    EXPECT_EQ(Model::load(folder_, options, &model).message(), "");
    const auto session = start(*model, Attention::kMsa, std::ssize(tokens));
    std::vector<float> logits(96);
    for (size_t at = 0; at < tokens.size(); at += piece) {
      const Status status = session->extend(tokens.subspan(at, piece), logits);
      EXPECT_EQ(session->length(), std::ssize(tokens.first(status.ok() ? at + piece : at)));
      if (!status.ok()) return status;
    }
    return {};
  }
  void write(const std::string& name = "model.safetensors") {
    std::FILE* file = std::fopen((folder_ / name).c_str(), "wb");
    ASSERT_NE(file, nullptr);
    EXPECT_EQ(write_safetensors(file, tensors_).message(), "");
    ASSERT_EQ(std::fclose(file), 0);
  }
  void write_text(const std::string& name, const std::string& text) {
    std::ofstream(folder_ / name) << text;
  }
  void expect_error(const std::string& part) {
    const std::string message = load_message();
    EXPECT_NE(message.find(part), std::string::npos) << "gave: " << message;
  }

  fs::path folder_ = fs::path(testing::TempDir()) / "msa_model_test";
  SafetensorsFile file_;
  Tensors tensors_;
  std::deque<std::vector<float>> owned_;
};

TEST_F(BrokenCheckpoint, AnUnchangedCopyLoads) {
  write();
  EXPECT_EQ(load_message(), "");
}

TEST_F(BrokenCheckpoint, AWrongShapeNamesBoth) {
  tensor("model.layers.2.self_attn.k_proj.weight").shape[0] = 127;
  write();
  expect_error("model.layers.2.self_attn.k_proj.weight: shape: got [127,64], expected [128,64]");
}

TEST_F(BrokenCheckpoint, AWrongDtypeIsNamed) {
  TensorView& view = tensor("model.norm.weight");
  view.dtype = DType::kI32;
  view.shape[0] /= 2;
  write();
  expect_error("model.norm.weight: dtype: got I32, supported are F32, BF16 and F16");
}

TEST_F(BrokenCheckpoint, MissingAndUnknownTensorsAreNamed) {
  std::swap(tensors_[7], tensors_.back());
  const auto removed = tensors_.back();
  tensors_.pop_back();
  write();
  expect_error(removed.first + ": missing");
  tensors_.push_back(removed);
  tensors_.emplace_back("model.layers.0.self_attn.q_proj.bias", removed.second);
  write();
  expect_error("model.layers.0.self_attn.q_proj.bias: no part of the model");
}

TEST_F(BrokenCheckpoint, TheSameTensorUnderTwoNames) {
  tensors_.emplace_back("language_model.lm_head.weight", tensor("lm_head.weight"));
  write();
  const std::string path = (folder_ / "model.safetensors").string();
  expect_error("lm_head.weight: given twice, by " + path + " and by " + path);
}

TEST_F(BrokenCheckpoint, NumbersThatAreNone) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float infinity = std::numeric_limits<float>::infinity();
  const std::string path = (folder_ / "model.safetensors").string();
  const std::span<float> values = own("model.layers.2.self_attn.v_proj.weight");
  for (const float bad : {nan, -nan, infinity, -infinity}) {
    for (const auto& [place, text] : {std::pair<size_t, const char*>{0, "[0,0]"},
                                      {64 * 70 + 3, "[70,3]"},
                                      {64 * 128 - 1, "[127,63]"}}) {
      const float good = std::exchange(values[place], bad);
      write();
      expect_error(path + ": tensor model.layers.2.self_attn.v_proj.weight: element " + text +
                   " is NaN or infinity");
      values[place] = good;
    }
  }
  values[5] = std::numeric_limits<float>::max();
  values[6] = std::numeric_limits<float>::denorm_min();
  write();
  EXPECT_EQ(load_message(), "");
}

TEST_F(BrokenCheckpoint, NumbersThatAreNoneInHalfPrecision) {
  TensorView& view = tensor("model.norm.weight");
  std::vector<uint16_t> halves(64, 0x3c00);
  view.data = halves.data();
  for (const auto& [dtype, largest] :
       {std::pair<DType, uint16_t>{DType::kBF16, 0x7f7f}, {DType::kF16, 0x7bff}}) {
    view.dtype = dtype;
    halves[63] = largest;
    write();
    EXPECT_EQ(load_message(), "");
    for (const int sign : {0, 0x8000}) {
      halves[63] = static_cast<uint16_t>((largest + 1) | sign);
      write();
      expect_error("model.norm.weight: element [63] is NaN or infinity");
    }
  }
}

// Finite weights whose products overflow: the first token whose numbers end, however it is cut
// into pieces, and the layer where they do.
TEST_F(BrokenCheckpoint, OverflowNamesLayerAndToken) {
  std::vector<int32_t> tokens = random_tokens(70);
  std::ranges::replace(tokens, 7, 8);
  tokens[41] = tokens[50] = 7;
  const auto expect = [&](const std::string& what) {
    write();
    for (const size_t piece : {size_t{70}, size_t{14}, size_t{1}}) {
      for (const LoadOptions& options : {LoadOptions{.threads = 1}, {.threads = 3}}) {
        const Status status = run(tokens, piece, options);
        EXPECT_EQ(status.code(), StatusCode::kNumeric);
        EXPECT_EQ(status.message(), what);
      }
    }
  };
  const std::string reason = " holds NaN, infinity or a number too large to square";
  const Tensors whole = tensors_;
  std::ranges::fill(own("model.embed_tokens.weight").subspan(7 * 64, 64), 1e30f);
  expect("layer 0, token 41: its embedding" + reason);
  tensors_ = whole;
  for (float& value : own("model.layers.2.self_attn.o_proj.weight")) value *= 1e38f;
  expect("layer 2, token 0: its attention" + reason);
  tensors_ = whole;
  for (float& value : own("model.layers.3.self_attn.indexer.k_proj.weight")) value *= 1e38f;
  expect("layer 3, token 0: its index k" + reason);
  tensors_ = whole;
  for (float& value : own("model.layers.3.mlp.shared_experts.down_proj.weight")) value *= 1e38f;
  expect("layer 3, token 0: its MLP" + reason);
}

TEST_F(BrokenCheckpoint, OverflowOfTheHead) {
  const std::span<float> head = own("lm_head.weight");
  for (float& value : head.subspan(0, 64)) value = value > 0 ? 3e38f : -3e38f;
  write();
  const std::vector<int32_t> tokens = random_tokens(40);
  const Status status = run(tokens, 40);
  EXPECT_EQ(status.code(), StatusCode::kNumeric);
  EXPECT_NE(status.message().find("head, token 39: its logit 0 is "), std::string::npos)
      << status.message();

  std::unique_ptr<Model> model;
  ASSERT_EQ(Model::load(folder_, {}, &model).message(), "");
  const auto session = start(*model, Attention::kMsa, 40);
  Hooks hooks;
  hooks.on_loss = [](int64_t, std::span<const float>) { FAIL() << "a loss that is no number"; };
  EXPECT_EQ(session->extend(tokens, {}, hooks).code(), StatusCode::kNumeric);
  EXPECT_EQ(session->length(), 0);
}

TEST_F(BrokenCheckpoint, ATruncatedFileIsNamed) {
  write();
  const fs::path path = folder_ / "model.safetensors";
  fs::resize_file(path, fs::file_size(path) - 100);
  expect_error("truncated?");
  fs::resize_file(path, 4);
  expect_error("model.safetensors: got 4 bytes");
}

TEST_F(BrokenCheckpoint, MissingFilesAreNamed) {
  expect_error("has neither model.safetensors nor model.safetensors.index.json");
  fs::remove(folder_ / "config.json");
  expect_error("config.json: No such file");
}

TEST_F(BrokenCheckpoint, BadIndexFilesAreNamed) {
  write("a.safetensors");
  const std::string index = "model.safetensors.index.json";
  write_text(index, "{");
  expect_error("expected a JSON object with a weight_map");
  write_text(index, R"({"weight_map":{"lm_head.weight":7}})");
  expect_error("lm_head.weight: expected a file name");
  write_text(index, R"({"weight_map":{"lm_head.weight":"../a.safetensors"}})");
  expect_error("expected a plain file name");
  write_text(index, R"({"weight_map":{"lm_head.weight":"b.safetensors"}})");
  expect_error("missing shard");
  write_text(index, R"({"weight_map":{"other.weight":"a.safetensors"}})");
  expect_error("tensor other.weight: missing, though");
  write_text(index, R"({"weight_map":{"lm_head.weight":"a.safetensors"}})");
  EXPECT_EQ(load_message(), "");
}

// Two shards hold a tensor: the index decides, or both files are named.
TEST_F(BrokenCheckpoint, AnOverlayIsWhatTheIndexSays) {
  write("a.safetensors");
  const Tensors whole = tensors_;
  std::ranges::fill(own("lm_head.weight"), 0.0f);
  tensors_ = {{"lm_head.weight", tensor("lm_head.weight")}};
  write("b.safetensors");
  tensors_ = whole;
  const auto logits = [&](const char* shard, const char* other) {
    write_text("model.safetensors.index.json", std::string(R"({"weight_map":{"lm_head.weight":")") +
                                                   shard + R"(","model.norm.weight":")" + other +
                                                   R"("}})");
    std::unique_ptr<Model> model;
    EXPECT_EQ(Model::load(folder_, {}, &model).message(), "");
    return logits_after(*model, Attention::kMsa, std::vector<int32_t>{1, 2, 3}, {3});
  };
  EXPECT_EQ(logits("b.safetensors", "a.safetensors"), std::vector<float>(96));
  EXPECT_NE(logits("a.safetensors", "a.safetensors"), std::vector<float>(96));

  write_text("model.safetensors.index.json",
             R"({"weight_map":{"model.norm.weight":"a.safetensors"}})");
  EXPECT_EQ(load_message(), "");  // b is no shard of this index
  tensors_ = {{"lm_head.weight", tensor("lm_head.weight")},
              {"language_model.model.norm.weight", tensor("model.norm.weight")}};
  write("b.safetensors");
  write_text("model.safetensors.index.json",
             R"({"weight_map":{"model.norm.weight":"a.safetensors",)"
             R"("language_model.model.norm.weight":"b.safetensors"}})");
  expect_error("tensor lm_head.weight: given twice, by " + (folder_ / "a.safetensors").string() +
               " and by " + (folder_ / "b.safetensors").string());
}

}  // namespace
}  // namespace msa::model
