// The model against Hugging Face's, by the files that tests/golden/make_goldens.py makes.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <numbers>
#include <string>

#include "core/half.h"
#include "model/model.h"
#include "model/safetensors.h"
#include "model/tokens.h"

namespace msa::model {
namespace {

namespace fs = std::filesystem;

const fs::path kRoot = MSA_SOURCE_DIR;
constexpr double kLogitTolerance = 2e-3;
constexpr double kBitsTolerance = 5e-4;

std::unique_ptr<Model> load(const fs::path& directory, const LoadOptions& options = {}) {
  std::unique_ptr<Model> model;
  EXPECT_EQ(Model::load(directory, options, &model).message(), "");
  return model;
}

std::vector<int32_t> sample_text(size_t count) {
  std::ifstream in(kRoot / "models/code-11m/sample.txt", std::ios::binary);
  std::string text(count, '\0');
  in.read(text.data(), static_cast<std::streamsize>(count));
  return tokens_of(text);
}

// One golden file: logits at some positions, and the blocks HF selected as bit masks.
class Golden {
 public:
  explicit Golden(const std::string& name) {
    EXPECT_EQ(SafetensorsFile::open(kRoot / "tests/golden" / name, &file_).message(), "");
    EXPECT_EQ(read_int32(*file_.find("positions"), &positions_).message(), "");
    context = std::stoll(file_.metadata.at("context"));
    first_selected_ = std::stoll(file_.metadata.at("first_selected"));
  }

  std::vector<int32_t> tokens() const {
    std::vector<int32_t> ids;
    EXPECT_EQ(read_int32(*file_.find("tokens"), &ids).message(), "");
    return ids;
  }

  /// Largest difference to the golden `tensor` ("logits"), given logits as they come.
  void compare(const char* tensor, int64_t first, const TensorView& logits, double* worst) const {
    TensorView golden;
    EXPECT_EQ(file_.view(tensor, &golden).message(), "");
    for (size_t i = 0; i < positions_.size(); ++i) {
      const int64_t row = positions_[i] - first;
      if (row < 0 || row >= logits.shape[0]) continue;
      for (int64_t c = 0; c < logits.shape[1]; ++c)
        *worst = std::max(
            *worst, std::abs(static_cast<double>(*logits.at<float>(row, c) -
                                                 *golden.at<float>(static_cast<int64_t>(i), c))));
    }
  }

  /// The blocks HF selected: all visible ones where there was no choice.
  std::vector<int32_t> selected(int layer, int64_t head, int64_t position,
                                const Config& config) const {
    std::vector<int32_t> blocks;
    const TensorEntry* masks = file_.find("layers." + std::to_string(layer) + ".selected");
    const int64_t row = position - first_selected_;
    uint32_t bits = ~uint32_t{0};
    if (masks != nullptr && row >= 0) {
      const int64_t at = head * masks->shape[1] + row;
      std::memcpy(&bits, masks->bytes.data() + at * 4, 4);
    }
    const auto visible = static_cast<int32_t>(position / config.block_size + 1);
    for (int32_t block = 0; block < std::min(visible, 32); ++block)
      if (bits >> block & 1) blocks.push_back(block);
    return blocks;
  }

  int64_t context = 0;

 private:
  SafetensorsFile file_;
  std::vector<int32_t> positions_;
  int64_t first_selected_ = 0;
};

// Judges our own selection by the gap of the scores where it differs from HF's, then takes HF's:
// a flip at a near tie is no error, but everything behind it would differ.
class Teacher {
 public:
  Teacher(const Golden& golden, const Config& config, Hooks* hooks)
      : golden_(golden), config_(config) {
    hooks->on_index = [this](int, int64_t, const TensorView& q, const TensorView& k) {
      q_.assign(q.at<float>(), q.at<float>() + q.numel());
      k_.assign(k.at<float>(), k.at<float>() + k.numel());
    };
    hooks->force_selection = [this](int layer, int64_t first, const TensorView& ids) {
      for (int64_t head = 0; head < ids.shape[0]; ++head)
        for (int64_t row = 0; row < ids.shape[1]; ++row) teach(layer, head, first, row, ids);
    };
  }

  int64_t selections = 0, flips = 0;
  double worst_gap = 0;  ///< relative to the scores

 private:
  double score(int64_t head, int64_t row, int64_t position, int32_t block) const {
    const int64_t dim = config_.index_dim;
    const float* q = q_.data() + (row * config_.heads_kv + head) * dim;
    double best = -HUGE_VAL;
    const int64_t end = std::min(position, int64_t{block + 1} * config_.block_size - 1);
    for (int64_t s = int64_t{block} * config_.block_size; s <= end; ++s) {
      double dot = 0;
      for (int64_t c = 0; c < dim; ++c)
        dot +=
            static_cast<double>(q[c]) * static_cast<double>(k_[static_cast<size_t>(s * dim + c)]);
      best = std::max(best, dot);
    }
    return best;
  }

  void teach(int layer, int64_t head, int64_t first, int64_t row, const TensorView& ids) {
    const int64_t position = first + row;
    int32_t* list = ids.at<int32_t>(head, row);
    const int64_t size = ids.shape[2];
    const std::vector<int32_t> own(list, std::find(list, list + size, -1));
    const std::vector<int32_t> theirs = golden_.selected(layer, head, position, config_);
    EXPECT_EQ(own.size(), theirs.size()) << "layer " << layer << ", position " << position;
    ++selections;
    if (own != theirs) {
      ++flips;
      for (int32_t a : own) {
        for (int32_t b : theirs) {
          if (std::ranges::count(theirs, a) > 0 || std::ranges::count(own, b) > 0) continue;
          const double mine = score(head, row, position, a), other = score(head, row, position, b);
          worst_gap = std::max(worst_gap, std::abs(mine - other) / std::max(1.0, std::abs(other)));
        }
      }
    }
    std::fill(list, list + size, -1);
    std::copy_n(theirs.begin(), std::min<size_t>(theirs.size(), static_cast<size_t>(size)), list);
  }

  const Golden& golden_;
  const Config& config_;
  std::vector<float> q_, k_;
};

struct Outcome {
  double worst = 0;
  int64_t flips = 0, selections = 0;
  double worst_gap = 0;
};

Outcome compare(const Model& model, const Golden& golden, std::span<const int32_t> tokens,
                Attention attention) {
  std::unique_ptr<Session> session;
  EXPECT_EQ(Session::create(model, attention, golden.context, &session).message(), "");
  Outcome outcome;
  Hooks hooks;
  Teacher teacher(golden, model.config(), &hooks);
  const bool dense = attention == Attention::kDense;
  hooks.on_logits = [&](int64_t first, const TensorView& logits) {
    golden.compare(dense ? "dense_logits" : "logits", first, logits, &outcome.worst);
  };
  EXPECT_EQ(session->extend(tokens, {}, hooks).message(), "");
  outcome.flips = teacher.flips;
  outcome.selections = teacher.selections;
  outcome.worst_gap = teacher.worst_gap;
  return outcome;
}

void expect_code_11m(int64_t length) {
  const auto model = load(kRoot / "models/code-11m");
  const Golden golden("code-11m." + std::to_string(length) + ".safetensors");
  const auto tokens = sample_text(static_cast<size_t>(length));
  const Outcome msa = compare(*model, golden, tokens, Attention::kMsa);
  std::printf("%lld tokens: logits differ by %.2g; %lld of %lld selections flipped, gap %.2g\n",
              static_cast<long long>(length), msa.worst, static_cast<long long>(msa.flips),
              static_cast<long long>(msa.selections), msa.worst_gap);
  EXPECT_GT(msa.worst, 0);  // something was compared
  EXPECT_LE(msa.worst, kLogitTolerance);
  EXPECT_LE(msa.worst_gap, 1e-4);
  if (length > 2048) {
    EXPECT_LE(compare(*model, golden, tokens, Attention::kDense).worst, kLogitTolerance);
  }
}

TEST(ModelGolden, Code11mShort) {
  expect_code_11m(200);
  expect_code_11m(1000);
}

TEST(ModelGoldenLong, Code11mBeyondTheSelectedBlocks) {
  expect_code_11m(2500);
  expect_code_11m(4096);
}

TEST(ModelGolden, TinyMoeInBothNamings) {
  const Golden golden("tiny.safetensors");
  const auto tokens = golden.tokens();
  for (const char* form : {"module", "released"}) {
    const auto model = load(kRoot / "tests/golden/tiny" / form);
    const Outcome outcome = compare(*model, golden, tokens, Attention::kMsa);
    std::printf("tiny (%s): logits differ by %.2g; %lld of %lld selections flipped, gap %.2g\n",
                form, outcome.worst, static_cast<long long>(outcome.flips),
                static_cast<long long>(outcome.selections), outcome.worst_gap);
    EXPECT_GT(outcome.worst, 0);
    EXPECT_LE(outcome.worst, kLogitTolerance);
    EXPECT_LE(outcome.worst_gap, 1e-4);
  }
}

// Own selections here, as a user has them.
double bits_per_byte(const Model& model, Attention attention, std::span<const int32_t> tokens,
                     size_t upto, double* at_upto) {
  std::unique_ptr<Session> session;
  EXPECT_EQ(Session::create(model, attention, std::ssize(tokens), &session).message(), "");
  double nats = 0;
  Hooks hooks;
  hooks.on_loss = [&](int64_t first, std::span<const float> losses) {
    for (size_t i = 0; i < losses.size(); ++i) {
      nats += static_cast<double>(losses[i]);
      if (static_cast<size_t>(first) + i + 1 == upto)
        *at_upto = nats / static_cast<double>(upto - 1) / std::numbers::ln2;
    }
  };
  EXPECT_EQ(session->extend(tokens, {}, hooks).message(), "");
  return nats / static_cast<double>(tokens.size() - 1) / std::numbers::ln2;
}

TEST(ModelGoldenLong, BitsPerByte) {
  std::ifstream in(kRoot / "tests/golden/bits.json");
  const auto golden = nlohmann::json::parse(std::string(std::istreambuf_iterator<char>(in), {}));
  const auto model = load(kRoot / "models/code-11m");
  const auto tokens = sample_text(8192);
  for (const auto& [name, attention] :
       {std::pair("dense", Attention::kDense), std::pair("msa", Attention::kMsa)}) {
    double at_4k = 0;
    const double at_8k = bits_per_byte(*model, attention, tokens, 4096, &at_4k);
    std::printf("%s: %.5f bits per byte at 4K, %.5f at 8K\n", name, at_4k, at_8k);
    EXPECT_NEAR(at_4k, golden["4096"][name].get<double>(), kBitsTolerance) << name;
    EXPECT_NEAR(at_8k, golden["8192"][name].get<double>(), kBitsTolerance) << name;
  }
}

}  // namespace
}  // namespace msa::model
