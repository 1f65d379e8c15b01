// The readable specification as a backend, in fp32 and in fp64.
#include <thread>

#include "core/layer_decode.h"
#include "core/registry.h"
#include "core/text.h"
#include "reference/attention.h"
#include "reference/cache.h"
#include "reference/index.h"
#include "reference/training.h"

namespace msa {
namespace {

template <class Real>
class ReferenceBackend final : public Backend {
 public:
  ReferenceBackend(const char* name, int priority) : name_(name), priority_(priority) {}

  const char* name() const override { return name_; }
  const char* requirement() const override { return "any CPU"; }
  int priority() const override { return priority_; }
  DeviceKind device() const override { return DeviceKind::kCPU; }
  Status usable() const override { return {}; }
  Status supports(const Problem&) const override { return {}; }

  int64_t workspace_bytes(const Problem& problem, const Limits& limits) const override {
    if (problem.op == Op::kLayerDecode) return layer_decode_bytes(*this, problem, limits);
    const unsigned all = std::max(1u, std::thread::hardware_concurrency());
    const int64_t workers = limits.max_threads > 0 ? limits.max_threads : all;
    return workers * scratch_bytes(problem, limits);
  }

  using Backend::run;
  Status run(const Plan& plan, const IndexScoresParams& a, Workspace w, Queue q) const override {
    reference::index_scores<Real>(plan.problem, a, team(plan, w, q));
    return {};
  }
  Status run(const Plan& plan, const SelectBlocksParams& a, Workspace w, Queue q) const override {
    reference::select_blocks(plan.problem, a, team(plan, w, q));
    return {};
  }
  Status run(const Plan& plan, const IndexSelectParams& a, Workspace w, Queue q) const override {
    reference::index_select<Real>(plan.problem, a, team(plan, w, q));
    return {};
  }
  Status run(const Plan& plan, const SparseAttentionParams& a, Workspace w,
             Queue q) const override {
    reference::sparse_attention<Real>(plan.problem, a, team(plan, w, q));
    return {};
  }
  Status run(const Plan& plan, const DenseAttentionParams& a, Workspace w, Queue q) const override {
    reference::dense_attention<Real>(plan.problem, a, team(plan, w, q));
    return {};
  }
  Status run(const Plan& plan, const MergeParams& a, Workspace w, Queue q) const override {
    reference::merge<Real>(plan.problem, a, team(plan, w, q));
    return {};
  }
  Status run(const Plan& plan, const BlockListsParams& a, Workspace w, Queue q) const override {
    reference::block_lists(plan.problem, a, team(plan, w, q));
    return {};
  }
  Status run(const Plan& plan, const AppendPagedParams& a, Workspace w, Queue q) const override {
    reference::append_paged(plan.problem, a, team(plan, w, q));
    return {};
  }
  Status run(const Plan& plan, const BlockMassParams& a, Workspace w, Queue q) const override {
    reference::block_mass<Real>(plan.problem, a, team(plan, w, q));
    return {};
  }
  Status run(const Plan& plan, const AttentionBackwardParams& a, Workspace w,
             Queue q) const override {
    reference::attention_backward<Real>(plan.problem, a, team(plan, w, q));
    return {};
  }
  Status run(const Plan& plan, const IndexLseParams& a, Workspace w, Queue q) const override {
    reference::index_lse<Real>(plan.problem, a, team(plan, w, q));
    return {};
  }
  Status run(const Plan& plan, const KlParams& a, Workspace w, Queue q) const override {
    reference::kl<Real>(plan.problem, a, team(plan, w, q));
    return {};
  }

 private:
  /// What one worker needs for one query or key: a score and an id per block, a logit per token and
  /// D sums, or the sums of a gradient row; a multiple of a cache line.
  static int64_t scratch_bytes(const Problem& p, const Limits& limits) {
    int64_t bytes = 0;
    if (p.op == Op::kSelectBlocks || p.op == Op::kIndexSelect)
      bytes = (limits.max_kv_len + p.block_size - 1) / p.block_size * 8;
    if (p.op == Op::kSparseAttention || p.op == Op::kSparseDecode || p.op == Op::kDenseAttention)
      bytes = (limits.max_kv_len + p.head_dim) * int64_t{sizeof(Real)};
    if (p.op == Op::kSparseAttentionBackward || p.op == Op::kDenseAttentionBackward)
      bytes = int64_t{2} * p.head_dim * int64_t{sizeof(Real)};
    if (p.op == Op::kKlBackward || p.op == Op::kKlLoss) bytes = p.index_dim * int64_t{sizeof(Real)};
    return (bytes + 63) / 64 * 64;
  }

  /// The queue's threads if the plan has scratch for each of them, else the calling one alone.
  static reference::Team team(const Plan& plan, Workspace workspace, Queue queue) {
    const int64_t each = scratch_bytes(plan.problem, plan.limits);
    const bool fits = queue.threads != nullptr &&
                      (each == 0 || queue.threads->count() * each <= plan.workspace_bytes);
    return {fits ? queue.threads : nullptr, static_cast<std::byte*>(workspace.data), each};
  }

  const char* name_;
  int priority_;
};

}  // namespace

const Backend* reference_backend() {
  static const ReferenceBackend<float> backend("reference", 0);
  return &backend;
}

const Backend* reference_f64_backend() {
  static const ReferenceBackend<double> backend("reference-f64", -1);
  return &backend;
}

}  // namespace msa
