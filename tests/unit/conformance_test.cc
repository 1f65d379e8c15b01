// The harness itself: it must find what is wrong. A backend that makes one mistake on purpose is
// put before it for every kind of mistake.
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <set>
#include <string>
#include <type_traits>

#include "conformance/harness.h"
#include "core/half.h"
#include "core/layer.h"
#include "core/op_table.h"
#include "core/registry.h"

namespace msa::conformance {
namespace {

/// What a Saboteur may change before and after the reference does the work.
struct Call {
  Plan& plan;
  Params& params;
  Workspace workspace;
  Queue queue;
};

/// The reference with one defect. One lives at a time.
class Saboteur {
 public:
  using Change = std::function<void(Call&)>;
  Saboteur(Change before, Change after, int64_t extra_workspace)
      : before_(std::move(before)), after_(std::move(after)), extra_(extra_workspace) {
    current = this;
    for_each_op([&]<class P>(Op op) {
      kernels_.push_back({.op = op,
                          .name = "saboteur",
                          .fits = fits,
                          .workspace_bytes = workspace_bytes,
                          .run = run_typed<P, sabotage<P>>});
    });
    backend_.kernels = kernels_;
  }
  ~Saboteur() { current = nullptr; }
  Saboteur(const Saboteur&) = delete;
  Saboteur& operator=(const Saboteur&) = delete;

  const Backend& backend() const { return backend_; }

 private:
  static Refusal fits(const Problem& problem, const Limits&) {
    if (problem.block_size >= 8) return {};
    return {"block_size", nullptr, problem.block_size, "what is not too little for this test"};
  }
  static Plan real_plan(const Problem& problem, const Limits& limits) {
    Plan plan;
    bind(*find_backend("reference"), problem, limits, &plan);
    return plan;
  }
  static int64_t workspace_bytes(const Problem& problem, const Limits& limits) {
    return real_plan(problem, limits).workspace_bytes + current->extra_;
  }
  template <class P>
  static Status sabotage(const Plan& original, const P& a, Workspace w, Queue q) {
    Plan plan = real_plan(original.problem, original.limits);
    Params params = a;
    Call call{plan, params, w, q};
    if (current->before_) current->before_(call);
    MSA_TRY(run_checked(plan, std::get<P>(params), call.workspace, call.queue));
    params = a;
    if (current->after_) current->after_(call);
    return {};
  }

  static inline const Saboteur* current = nullptr;
  Change before_, after_;
  int64_t extra_;
  std::vector<Kernel> kernels_;
  Backend backend_{.name = "saboteur",
                   .requirement = "a test",
                   .priority = -100,
                   .device = DeviceKind::kCPU,
                   .usable = [] { return Status(); },
                   .kernels = {}};
};

struct Tally {
  int passed = 0, failed = 0, skipped = 0;
  std::set<std::string> details;
};

bool is_small(const Case& c) {
  int64_t pairs = 0;
  for (const SequenceSize& s : c.sequences) pairs += int64_t{s.q_len} * s.kv_len;
  return pairs * c.problem.heads_q * c.problem.head_dim < 4'000'000;
}

/// The small cases of some operators on one backend: of the smoke suite, or of the full one until
/// a failure mentions `words`.
Tally try_backend(const Saboteur& saboteur, const std::set<Op>& ops, const char* words = nullptr) {
  static Harness harness(3);
  Tally tally;
  const Backend* const list[] = {&saboteur.backend()};
  for (const Case& c : make_cases(words == nullptr ? Suite::kSmoke : Suite::kFull)) {
    if (!ops.contains(c.problem.op) || !is_small(c)) continue;
    for (const Result& result : harness.run(c, list)) {
      ++(result.outcome == Outcome::kPassed   ? tally.passed
         : result.outcome == Outcome::kFailed ? tally.failed
                                              : tally.skipped);
      if (!result.detail.empty()) tally.details.insert(result.detail);
      if (result.outcome == Outcome::kFailed && words != nullptr &&
          result.detail.find(words) != std::string::npos)
        return tally;
    }
  }
  return tally;
}

bool mentions(const Tally& tally, const std::string& words) {
  return std::any_of(tally.details.begin(), tally.details.end(), [&](const std::string& detail) {
    return detail.find(words) != std::string::npos;
  });
}

/// The harness must fail this backend, in the given words.
void expect_found(const std::set<Op>& ops, const char* words, Saboteur::Change before,
                  Saboteur::Change after = {}, int64_t extra_workspace = 0) {
  const Tally tally =
      try_backend(Saboteur(std::move(before), std::move(after), extra_workspace), ops, words);
  EXPECT_GT(tally.failed, 0) << "nothing failed for: " << words;
  EXPECT_TRUE(mentions(tally, words))
      << words << ": " << (tally.details.empty() ? "" : *tally.details.begin());
}

const std::set<Op> kAttention = {Op::kSparseAttention, Op::kDenseAttention};
const std::set<Op> kIndex = {Op::kIndexScores, Op::kIndexSelect};
const std::set<Op> kBackward = {Op::kSparseAttentionBackward, Op::kDenseAttentionBackward};
const std::set<Op> kKl = {Op::kKlBackward, Op::kKlLoss};

Batch* batch_of(Params& params) {
  return std::visit(
      []<class P>(P& a) -> Batch* {
        if constexpr (requires { a.batch; }) return &a.batch;
        return nullptr;
      },
      params);
}

/// Calls f(data, dtype, offset) for the first element of the first output that is not empty.
void with_first_element(Params& params, const std::function<void(TensorView&, int64_t)>& f) {
  for (const Output& output : outputs(params))
    if (output.view->numel() > 0) return f(*output.view, element_offset(*output.view, 0));
}

TEST(Conformance, AnHonestBackendPasses) {
  std::set<Op> all;
  for (const OpInfo& op : all_ops()) all.insert(op.op);
  const Tally tally = try_backend(Saboteur({}, {}, 0), all);
  EXPECT_EQ(tally.failed, 0) << *tally.details.begin();
  EXPECT_GT(tally.passed, 60);
  EXPECT_EQ(tally.skipped > 0, mentions(tally, "too little for this test"));
}

TEST(Conformance, FindsAForgottenMask) {
  for (const std::set<Op>& ops :
       {kAttention, kIndex, std::set{Op::kBlockMass}, kBackward, std::set{Op::kIndexLse}, kKl})
    expect_found(ops, "expected", [](Call& call) { batch_of(call.params)->causal = false; });
}

TEST(Conformance, FindsTokensPastTheEnd) {
  // One token more of a paged sequence: what lies there is not a number.
  for (const std::set<Op>& ops : {kAttention, kIndex}) {
    std::vector<int32_t> longer;
    expect_found(ops, "expected", [&](Call& call) {
      Batch& batch = *batch_of(call.params);
      if (!batch.seq_lens.given()) return;
      const int32_t block = call.plan.problem.block_size;
      longer.assign(batch.seq_lens.at<int32_t>(),
                    batch.seq_lens.at<int32_t>() + batch.seq_lens.shape[0]);
      for (int32_t& length : longer) length += length % block != 0 ? 1 : 0;
      batch.seq_lens.data = longer.data();
    });
  }
}

TEST(Conformance, FindsAWrongScale) {
  expect_found(kAttention, "o[", [](Call& call) {
    std::visit(
        [&]<class P>(P& a) {
          if constexpr (requires { a.softmax_scale; })
            a.softmax_scale = 1.001f / std::sqrt(static_cast<float>(call.plan.problem.head_dim));
        },
        call.params);
  });
}

TEST(Conformance, FindsAListThatIsCut) {
  const auto cut = [](Call& call) {
    call.plan.problem.topk = std::max(1, call.plan.problem.topk - 1);
  };
  expect_found({Op::kSparseAttention}, "o[", cut);
  expect_found({Op::kSparseAttentionBackward}, "dq[", cut);
  expect_found({Op::kKlBackward}, "dq_idx[", cut);
}

TEST(Conformance, FindsAGradientWithoutDelta) {
  expect_found(kBackward, "dq[", [](Call& call) {
    auto& a = std::get<AttentionBackwardParams>(call.params);
    a.o = a.d_o;
  });
}

TEST(Conformance, FindsATeacherOfOneHead) {
  static std::vector<float> lse;  // heads but the first of each group give nothing
  const auto silence = [](Call& call) {
    auto& a = std::get<KlParams>(call.params);
    lse.assign(static_cast<size_t>(a.lse.shape[0] * a.lse.shape[1]), -INFINITY);
    const TensorView one =
        TensorView::contiguous(lse.data(), DType::kF32, {a.lse.shape[0], a.lse.shape[1]});
    const int64_t rows = a.batch.cu_seqlens_q.at<int32_t>()[a.batch.cu_seqlens_q.shape[0] - 1];
    for (int64_t t = 0; t < rows; ++t)
      for (int64_t h = 0; h < one.shape[1]; h += call.plan.problem.group())
        *one.at<float>(t, h) = *a.lse.at<float>(t, h);
    a.lse = one;
  };
  expect_found({Op::kKlBackward}, "dq_idx[", silence);
  expect_found({Op::kKlLoss}, "kl[", silence);
}

TEST(Conformance, FindsGradientsOfKeysThatAreLeftOut) {
  // The gradient of the last key of the batch is forgotten.
  expect_found(kBackward, "dv[", {}, [](Call& call) {
    auto& a = std::get<AttentionBackwardParams>(call.params);
    const int64_t last = a.batch.cu_seqlens_k.at<int32_t>()[a.batch.cu_seqlens_k.shape[0] - 1] - 1;
    if (last < 0) return;
    std::memset(static_cast<std::byte*>(a.dv.data) + a.dv.offset(last, 0) * size_of(a.dv.dtype), 0,
                static_cast<size_t>(a.dv.shape[2] * size_of(a.dv.dtype)));
  });
}

TEST(Conformance, FindsAnLseInTheWrongBase) {
  expect_found(kAttention, "lse[", {}, [](Call& call) {
    for (const Output& output : outputs(call.params)) {
      if (std::string(output.name) != "lse") continue;
      for (int64_t i = 0; i < output.view->numel(); ++i)
        output.view->at<float>()[element_offset(*output.view, i)] *= 1.442695f;
    }
  });
}

TEST(Conformance, FindsForgottenForcedBlocks) {
  const std::set<Op> ops = {Op::kSelectBlocks, Op::kIndexSelect};
  expect_found(ops, "block_ids[", [](Call& call) { call.plan.problem.local_blocks = 0; });
  expect_found(ops, "block_ids[", [](Call& call) { call.plan.problem.init_blocks = 1; });
}

TEST(Conformance, FindsOneListForAllHeads) {
  expect_found({Op::kIndexSelect}, "block_ids[", {}, [](Call& call) {
    if (!std::holds_alternative<IndexSelectParams>(call.params)) return;
    auto& a = std::get<IndexSelectParams>(call.params);
    for (int64_t r = 1; r < a.block_ids.shape[0]; ++r)
      for (int64_t t = 0; t < a.block_ids.shape[1]; ++t)
        std::memcpy(a.block_ids.at<int32_t>(r, t), a.block_ids.at<int32_t>(0, t),
                    static_cast<size_t>(a.block_ids.shape[2]) * 4);
  });
}

TEST(Conformance, FindsTiesBrokenTheOtherWay) {
  // A chosen block gives way to a later one of the same score.
  expect_found({Op::kSelectBlocks}, "block_ids[", {}, [](Call& call) {
    auto& a = std::get<SelectBlocksParams>(call.params);
    for (int64_t r = 0; r < a.block_ids.shape[0]; ++r) {
      for (int64_t t = 0; t < a.block_ids.shape[1]; ++t) {
        int32_t* list = a.block_ids.at<int32_t>(r, t);
        const int64_t valid =
            a.num_valid_blocks.given() ? a.num_valid_blocks.at<int32_t>()[t] : a.scores.shape[2];
        for (int64_t slot = 0; slot + 1 < call.plan.problem.topk && list[slot + 1] != -1; ++slot) {
          const int32_t later = list[slot] + 1;
          const bool tie =
              later < valid && later < list[slot + 1] &&
              *a.scores.at<float>(r, t, later) == *a.scores.at<float>(r, t, list[slot]);
          if (tie && list[slot] >= call.plan.problem.init_blocks) list[slot] = later;
        }
      }
    }
  });
}

TEST(Conformance, FindsUnwrittenOutputs) {
  // One element left as it was: visible because what was there changes between repeats.
  for (const OpInfo& info : all_ops()) {
    if (info.op == Op::kAppendPaged) continue;  // may leave anything as it was
    std::byte kept[4];
    expect_found(
        {info.op}, "",
        [&](Call& call) {
          with_first_element(call.params, [&](TensorView& view, int64_t offset) {
            const int64_t size = size_of(view.dtype);
            std::memcpy(kept, static_cast<std::byte*>(view.data) + offset * size,
                        static_cast<size_t>(size));
          });
        },
        [&](Call& call) {
          with_first_element(call.params, [&](TensorView& view, int64_t offset) {
            const int64_t size = size_of(view.dtype);
            std::memcpy(static_cast<std::byte*>(view.data) + offset * size, kept,
                        static_cast<size_t>(size));
          });
        });
  }
}

TEST(Conformance, FindsWritesOutsideTheOutputs) {
  for (const OpInfo& info : all_ops()) {
    expect_found({info.op}, "writes outside its outputs", {}, [](Call& call) {
      TensorView view = *outputs(call.params)[0].view;
      std::memset(static_cast<std::byte*>(view.data) - 4, 0x11, 4);
    });
  }
}

TEST(Conformance, FindsWritesBehindTheWorkspace) {
  expect_found(
      kIndex, "writes behind its workspace", {},
      [](Call& call) {
        std::memset(static_cast<std::byte*>(call.workspace.data) + call.workspace.bytes, 0x11, 1);
      },
      64);
}

TEST(Conformance, FindsReadingTheWorkspaceBeforeWritingIt) {
  expect_found(
      kAttention, "differ",
      [](Call& call) {
        std::visit(
            [&]<class P>(P& a) {
              const bool dirty = static_cast<std::byte*>(call.workspace.data)[0] == std::byte{0};
              if constexpr (requires { a.softmax_scale; })
                if (dirty) a.softmax_scale = 0.9f;
            },
            call.params);
      },
      {}, 64);
}

TEST(Conformance, FindsResultsThatDependOnThreads) {
  // One bit in the last place of one element.
  expect_found(kAttention, "results with N threads differ", {}, [](Call& call) {
    if (call.queue.threads == nullptr) return;
    with_first_element(call.params, [](TensorView& view, int64_t offset) {
      *(static_cast<std::byte*>(view.data) + offset * size_of(view.dtype)) ^= std::byte{1};
    });
  });
}

TEST(Conformance, FindsResultsThatDoNotRepeat) {
  auto calls = std::make_shared<std::atomic<int>>(0);
  expect_found(kAttention, "differ", {}, [calls](Call& call) {
    if (++*calls % 3 != 0) return;
    with_first_element(call.params, [](TensorView& view, int64_t offset) {
      *(static_cast<std::byte*>(view.data) + offset * size_of(view.dtype)) ^= std::byte{1};
    });
  });
}

TEST(Conformance, FindsChangedInputs) {
  expect_found({Op::kMerge}, "writes into its inputs", {}, [](Call& call) {
    auto& a = std::get<MergeParams>(call.params);
    if (a.lse_parts.numel() > 0) *a.lse_parts.at<float>() += 1;
  });
}

TEST(Conformance, FindsAFusedSelectionThatIsNotTheTwoSteps) {
  // The call that is compared with the two steps asks for no scores.
  expect_found({Op::kIndexSelect}, "ids differ from index_scores + select_blocks", {},
               [](Call& call) {
                 auto* a = std::get_if<IndexSelectParams>(&call.params);
                 if (a != nullptr && !a->scores.given() && a->block_ids.numel() > 0)
                   *a->block_ids.at<int32_t>() ^= 1;
               });
}

// ---- the comparisons ----

TEST(Compare, PlacesOfNaNAndInfinityComeFirst) {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  const auto compare = [](std::vector<float> got, std::vector<float> want) {
    const auto view = [](std::vector<float>& x) {
      return TensorView::contiguous(x.data(), DType::kF32, {1, static_cast<int64_t>(x.size())});
    };
    Verdict verdict;
    compare_rows("x", view(got), view(want), {.absolute = 1e9}, &verdict);
    return verdict.failure;
  };
  EXPECT_EQ(compare({1, nan, -inf}, {2, nan, -inf}), "");
  EXPECT_EQ(compare({1, 5}, {1, nan}), "x[0,1]: got 5, expected nan");
  EXPECT_EQ(compare({nan, 5}, {1, 5}), "x[0,0]: got nan, expected 1");
  EXPECT_EQ(compare({inf, 5}, {-inf, 5}), "x[0,0]: got inf, expected -inf");
  EXPECT_EQ(compare({1, 0}, {1, -inf}), "x[0,1]: got 0, expected -inf");
}

TEST(Compare, ErrorsAreRelativeToTheRow) {
  std::vector<float> got = {100, 1, 1e-3f, 1e-5f}, want = {100, 1.001f, 1e-3f, 2e-5f};
  const auto compare = [&](const Tolerance& tolerance) {
    Verdict verdict;
    compare_rows("x", TensorView::contiguous(got.data(), DType::kF32, {2, 2}),
                 TensorView::contiguous(want.data(), DType::kF32, {2, 2}), tolerance, &verdict);
    return verdict;
  };
  EXPECT_TRUE(compare({.row = 1.1e-2}).ok());
  EXPECT_FALSE(compare({.row = 9e-3}).ok());  // the second row is off by 1e-5 of 1e-3
  EXPECT_NEAR(compare({.row = 1}).max_error, 1e-2, 1e-5);
  EXPECT_FALSE(compare({.element = 1e-2}).ok());
  EXPECT_TRUE(compare({.element = 0.51}).ok());
  EXPECT_TRUE(compare({.absolute = 2e-3}).ok());
  EXPECT_FALSE(compare({.row = 1, .cosine = 0.99999}).ok());
}

TEST(Compare, FlipsOfIdsAreJudgedByTheScoreGap) {
  const float inf = std::numeric_limits<float>::infinity();
  std::vector<float> scores = {5.0f, 3.0f, 2.99999f, 1.0f, 0.0f};
  std::vector<int32_t> want = {0, 1, 4, -1};
  std::vector<float> want_scores = {5, 3, inf, -inf};
  const auto compare = [&](std::vector<int32_t> got, double tolerance) {
    Verdict verdict;
    compare_ids(TensorView::contiguous(got.data(), DType::kI32, {1, 1, 4}),
                TensorView::contiguous(want.data(), DType::kI32, {1, 1, 4}),
                TensorView::contiguous(want_scores.data(), DType::kF32, {1, 1, 4}),
                TensorView::contiguous(scores.data(), DType::kF32, {1, 1, 5}), {0}, tolerance,
                &verdict);
    return verdict.ok();
  };
  EXPECT_TRUE(compare({0, 1, 4, -1}, 0));
  EXPECT_TRUE(compare({0, 2, 4, -1}, 1e-4));
  EXPECT_FALSE(compare({0, 2, 4, -1}, 1e-6));
  EXPECT_FALSE(compare({0, 2, 4, -1}, 0));
  EXPECT_FALSE(compare({0, 3, 4, -1}, 1e-4));
  EXPECT_FALSE(compare({0, 1, 2, -1}, 100)) << "a forced block is missing";
  EXPECT_FALSE(compare({2, 0, 4, -1}, 1)) << "not ascending";
  EXPECT_FALSE(compare({0, 0, 4, -1}, 100)) << "twice the same";
  EXPECT_FALSE(compare({0, 4, -1, -1}, 100)) << "too few";
  EXPECT_FALSE(compare({0, 1, 2, 4}, 100)) << "too many";
  EXPECT_FALSE(compare({0, 1, 5, -1}, 100)) << "out of range";
  EXPECT_FALSE(compare({-1, 0, 1, 4}, 100)) << "the end comes first";
}

// ---- the cases ----

TEST(Judge, AComposedKernelRoundsWhereItsStepsDo) {
  for (bool rounds : {false, true}) {
    const Kernel kernels[] = {
        {.op = Op::kIndexSelect, .name = "select"},
        {.op = Op::kSparseAttention, .name = "attend", .rounds_probabilities = rounds},
        kLayerSteps};
    const Backend backend{"steps", "nothing", 0, DeviceKind::kCPU, nullptr, kernels};
    const Problem problem{.op = Op::kLayer, .dtype = DType::kBF16};
    EXPECT_EQ(rounds_probabilities(plan_on(backend, problem, {})), rounds);
  }
}

TEST(Cases, AreManyAndAlwaysTheSame) {
  const std::vector<Case> full = make_cases(Suite::kFull), again = make_cases(Suite::kFull);
  EXPECT_GE(full.size(), 2000u);
  EXPECT_GE(make_cases(Suite::kSmoke).size(), 120u);
  ASSERT_EQ(full.size(), again.size());
  std::set<std::string> names;
  for (size_t i = 0; i < full.size(); ++i) {
    EXPECT_EQ(full[i].name, again[i].name);
    EXPECT_EQ(full[i].seed, again[i].seed);
    EXPECT_TRUE(validate(full[i].problem).ok()) << full[i].name;
    names.insert(name_of(full[i].problem.op) + full[i].name);
  }
  EXPECT_EQ(names.size(), full.size());
}

TEST(Cases, CoverWhatTheyShould) {
  std::map<std::string, std::set<int64_t>> seen;
  std::map<std::string, int> count;
  for (const Case& c : make_cases(Suite::kFull)) {
    const Problem& p = c.problem;
    seen["op.dtype.layout"].insert((static_cast<int>(p.op) * 3 + static_cast<int>(p.dtype)) * 2 +
                                   static_cast<int>(p.layout));
    seen["G"].insert(p.group());
    seen["values"].insert(static_cast<int>(c.values));
    seen["K"].insert(p.topk);
    seen["Bk"].insert(p.block_size);
    count["strided"] += c.strided;
    count["padded"] += c.padded_rows > 0;
    count["full"] += !c.causal;
    count["q_offset"] += c.q_offsets;
    count["shard"] += c.block_offsets;
    count["shared_ids"] += c.shared_ids;
    count["page rows"] += c.pages == PageForm::kRowsOfTable;
    count["flat pages"] += c.pages == PageForm::kFlatList;
    count["repeated_ids"] += c.repeated_ids;
    count["spoiled"] += c.first_sequence_spoiled() && c.sequences.size() > 1;
    count["selection without a mask"] += p.op == Op::kIndexSelect && !c.causal;
    count["forced"] += p.init_blocks > 0 || p.local_blocks > 1;
    count["D64"] += p.head_dim == 64;
    count["D128"] += p.head_dim == 128;
    for (const SequenceSize& s : c.sequences) {
      count["no keys"] += s.kv_len == 0;
      count["no queries"] += s.q_len == 0;
      count["one key"] += s.kv_len == 1;
      count["many queries"] += s.q_len > 128;
      count["more blocks than K"] += s.kv_len > p.topk * p.block_size;
      count["a full last block"] += s.kv_len > 0 && s.kv_len % p.block_size == 0;
      count["one token in the last block"] += s.kv_len % p.block_size == 1;
      count["one token missing"] += s.kv_len % p.block_size == p.block_size - 1;
    }
  }
  EXPECT_EQ(seen["op.dtype.layout"].size(), 3u * 23);
  for (int64_t group = 1; group <= 16; ++group) EXPECT_TRUE(seen["G"].contains(group)) << group;
  EXPECT_EQ(seen["values"].size(), 10u);
  for (int64_t k : {1, 2, 4, 8, 16, 32}) EXPECT_TRUE(seen["K"].contains(k)) << k;
  for (int64_t block : {8, 16, 32, 64, 128}) EXPECT_TRUE(seen["Bk"].contains(block)) << block;
  EXPECT_GE(count.size(), 20u);
  for (const auto& [what, cases] : count) EXPECT_GE(cases, 40) << what;
}

}  // namespace
}  // namespace msa::conformance
