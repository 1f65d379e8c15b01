#include "model/attention.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

#include "model/host_view.h"
#include "model/stopwatch.h"

namespace msa::model {
namespace {

// Kept mass is measured at every 64th position.
constexpr int64_t kProbeStep = 64;

}  // namespace

Problem attention_problem(const Config& config, DType dtype, Device device, Op op) {
  return {.op = op,
          .dtype = dtype,
          .layout = KvLayout::kPaged,
          .heads_q = config.heads_q,
          .heads_kv = config.heads_kv,
          .head_dim = config.head_dim,
          .index_dim = config.index_dim,
          .block_size = config.block_size,
          .topk = config.topk,
          .init_blocks = config.init_blocks,
          .local_blocks = config.local_blocks,
          .device = device};
}

Status SequenceAttention::create(Compute& compute, const Model& model, Attention kind,
                                 int64_t max_tokens, int64_t max_chunk) {
  const Config& config = model.config();
  compute_ = &compute;
  config_ = &config;
  dtype_ = model.dtype();
  backend_ = model.options().backend;
  kind_ = kind;
  page_count_ = (max_tokens + config.block_size - 1) / config.block_size;
  const int64_t padded = page_count_ * config.block_size;
  const int64_t probes = max_chunk / kProbeStep + 1;
  const bool selecting = kind == Attention::kMsa && config.sparse_layers() > 0;

  MSA_TRY(plan(Op::kAppendPaged, 1, max_chunk, &append_));
  MSA_TRY(plan(Op::kDenseAttention, 1, max_chunk, &dense_));
  if (selecting) {
    for (LayerPlans* plans : {&chunk_, &step_}) {
      const int64_t most = plans == &chunk_ ? max_chunk : std::min(max_chunk, kDecodeTokens);
      MSA_TRY(plan(Op::kLayer, 1, most, &plans->layer));
      MSA_TRY(plan(Op::kIndexSelect, 1, most, &plans->select));
      MSA_TRY(plan(Op::kSparseAttention, 1, most, &plans->attend));
    }
    MSA_TRY(plan(Op::kDenseAttention, probes, 1, &probe_));
  }
  int64_t scratch = 0;  // a layer's covers its steps'
  for (const Plan* p : {&append_, &dense_, &probe_, &chunk_.layer, &step_.layer})
    scratch = std::max(scratch, p->workspace_bytes);
  MSA_TRY(Buffer::create(compute, scratch, &workspace_));

  const int64_t kv_bytes = padded * config.heads_kv * config.head_dim * size_of(dtype_);
  caches_.resize(config.layers.size());
  for (size_t i = 0; i < caches_.size(); ++i) {
    MSA_TRY(Buffer::create(compute, kv_bytes, &caches_[i].k));
    MSA_TRY(Buffer::create(compute, kv_bytes, &caches_[i].v));
    if (selects(static_cast<int>(i)))
      MSA_TRY(
          Buffer::create(compute, padded * config.index_dim * size_of(dtype_), &caches_[i].k_idx));
  }
  std::vector<int32_t> table(static_cast<size_t>(page_count_));
  std::iota(table.begin(), table.end(), 0);
  const int64_t table_bytes = page_count_ * size_of(DType::kI32);
  MSA_TRY(Buffer::create(compute, table_bytes, &page_table_));
  compute.copy(page_table_.data(), table.data(), table_bytes);
  MSA_TRY(Buffer::create(compute, 3 * size_of(DType::kI32), &lengths_));

  const int64_t heads = config.heads_q;
  if (selecting) {
    MSA_TRY(Buffer::create(compute, config.heads_kv * max_chunk * config.topk * 4, &ids_));
    MSA_TRY(Buffer::create(compute, max_chunk * heads * 4, &lse_));
    MSA_TRY(Buffer::create(compute, (2 * probes + 1) * 4, &probe_lengths_));
    MSA_TRY(Buffer::create(compute, probes * heads * config.head_dim * 4, &probe_o_));
    MSA_TRY(Buffer::create(compute, probes * heads * 4, &probe_lse_));
  }
  attention_seconds_.assign(caches_.size(), 0);
  index_seconds_.assign(caches_.size(), 0);
  mass_.assign(caches_.size(), {});
  return {};
}

Status SequenceAttention::plan(Op op, int64_t max_batch, int64_t max_seqlen_q, Plan* out) {
  const Limits limits{.max_batch = max_batch,
                      .max_tokens = max_batch * max_seqlen_q,
                      .max_seqlen_q = max_seqlen_q,
                      .max_seqlen_k = page_count_ * config_->block_size,
                      .max_threads = compute_->threads()};
  return msa::plan(attention_problem(*config_, dtype_, compute_->device(), op), limits, out,
                   backend_);
}

bool SequenceAttention::selects(int layer) const {
  return kind_ == Attention::kMsa && config_->layers[static_cast<size_t>(layer)].sparse;
}

Status SequenceAttention::run(const Chunk& chunk, const Hooks& hooks) {
  MSA_TRY(append(chunk));
  return selects(chunk.layer) ? attend_selected(chunk, hooks) : attend_dense(chunk);
}

std::vector<double> SequenceAttention::kept_mass() const {
  std::vector<double> means;
  for (const Mass& mass : mass_)
    if (mass.count > 0) means.push_back(mass.sum / static_cast<double>(mass.count));
  return means;
}

Status SequenceAttention::append(const Chunk& chunk) {
  Cache& cache = caches_[static_cast<size_t>(chunk.layer)];
  AppendPagedParams params{.k = rows(chunk.k, chunk.tokens, config_->heads_kv, config_->head_dim),
                           .v = rows(chunk.v, chunk.tokens, config_->heads_kv, config_->head_dim),
                           .batch = batch(chunk),
                           .k_pages = pages(cache.k),
                           .v_pages = pages(cache.v)};
  if (selects(chunk.layer)) {
    params.k_idx = tensor(chunk.k_idx, dtype_, {chunk.tokens, config_->index_dim});
    params.k_idx_pages = index_pages(cache.k_idx);
  }
  return run_operator(append_, params);
}

Status SequenceAttention::attend_dense(const Chunk& chunk) {
  const Cache& cache = caches_[static_cast<size_t>(chunk.layer)];
  const int64_t heads = config_->heads_q, dim = config_->head_dim;
  const DenseAttentionParams params{.q = rows(chunk.q, chunk.tokens, heads, dim),
                                    .k = pages(cache.k),
                                    .v = pages(cache.v),
                                    .batch = batch(chunk),
                                    .o = tensor(chunk.o, DType::kF32, {chunk.tokens, heads, dim})};
  return time_operator(dense_, params, &attention_seconds_[static_cast<size_t>(chunk.layer)]);
}

Status SequenceAttention::attend_selected(const Chunk& chunk, const Hooks& hooks) {
  const auto layer = static_cast<size_t>(chunk.layer);
  const int64_t heads = config_->heads_q, dim = config_->head_dim;
  const TensorView ids =
      tensor(ids_.data(), DType::kI32, {config_->heads_kv, chunk.tokens, config_->topk});
  SparseAttentionParams attend{.q = rows(chunk.q, chunk.tokens, heads, dim),
                               .k = pages(caches_[layer].k),
                               .v = pages(caches_[layer].v),
                               .block_ids = ids,
                               .batch = batch(chunk),
                               .o = tensor(chunk.o, DType::kF32, {chunk.tokens, heads, dim})};
  if (hooks.kept_mass) attend.lse = tensor(lse_.data(), DType::kF32, {chunk.tokens, heads});
  if (hooks.time_index || hooks.force_selection) {
    MSA_TRY(attend_apart(attend, chunk, hooks));
  } else {
    const LayerParams params{
        .q = attend.q,
        .q_idx = rows(chunk.q_idx, chunk.tokens, config_->heads_kv, config_->index_dim),
        .k = attend.k,
        .v = attend.v,
        .k_idx = index_pages(caches_[layer].k_idx),
        .batch = attend.batch,
        .o = attend.o,
        .lse = attend.lse,
        .block_ids = ids};
    MSA_TRY(time_operator(plans(chunk).layer, params, &attention_seconds_[layer]));
    const Stopwatch timer(&untimed_seconds_);
    call_selection_hooks(chunk, hooks, ids);
  }
  if (!hooks.kept_mass) return {};
  const Stopwatch timer(&untimed_seconds_);
  return measure_kept_mass(chunk);
}

Status SequenceAttention::attend_apart(const SparseAttentionParams& attend, const Chunk& chunk,
                                       const Hooks& hooks) {
  const auto layer = static_cast<size_t>(chunk.layer);
  const IndexSelectParams select{
      .q_idx = rows(chunk.q_idx, chunk.tokens, config_->heads_kv, config_->index_dim),
      .k_idx = index_pages(caches_[layer].k_idx),
      .batch = attend.batch,
      .block_ids = attend.block_ids};
  double seconds = 0;
  MSA_TRY(time_operator(plans(chunk).select, select, &seconds));
  index_seconds_[layer] += seconds;
  attention_seconds_[layer] += seconds;
  {
    const Stopwatch timer(&untimed_seconds_);
    call_selection_hooks(chunk, hooks, attend.block_ids);
  }
  return time_operator(plans(chunk).attend, attend, &attention_seconds_[layer]);
}

void SequenceAttention::call_selection_hooks(const Chunk& chunk, const Hooks& hooks,
                                             const TensorView& ids) {
  if (hooks.on_index) {
    const Cache& cache = caches_[static_cast<size_t>(chunk.layer)];
    const HostView queries(*compute_,
                           rows(chunk.q_idx, chunk.tokens, config_->heads_kv, config_->index_dim));
    const HostView keys(*compute_, tensor(cache.k_idx.data(), dtype_,
                                          {chunk.first + chunk.tokens, config_->index_dim}));
    hooks.on_index(chunk.layer, chunk.first, queries.view(), keys.view());
  }
  if (!hooks.force_selection && !hooks.on_selection) return;
  HostView lists(*compute_, ids);
  if (hooks.force_selection) {
    hooks.force_selection(chunk.layer, chunk.first, lists.view());
    lists.write_back();
  }
  if (hooks.on_selection) hooks.on_selection(chunk.layer, chunk.first, lists.view());
}

// Every 64th query once more, densely: as a batch of one-token sequences that share the pages.
Status SequenceAttention::measure_kept_mass(const Chunk& chunk) {
  const int64_t heads = config_->heads_q, dim = config_->head_dim;
  const int64_t block = config_->block_size;
  const int64_t from = std::max(chunk.first, config_->topk * block);  // sees more than K blocks
  const int64_t start = (from + kProbeStep - 1) / kProbeStep * kProbeStep;
  const int64_t end = chunk.first + chunk.tokens;
  if (start >= end) return {};
  const int64_t probes = (end - start + kProbeStep - 1) / kProbeStep;

  std::vector<int32_t> lengths;
  for (int64_t i = 0; i <= probes; ++i) lengths.push_back(static_cast<int32_t>(i));
  for (int64_t i = 0; i < probes; ++i)
    lengths.push_back(static_cast<int32_t>(start + i * kProbeStep + 1));
  compute_->copy(probe_lengths_.data(), lengths.data(), static_cast<int64_t>(4 * lengths.size()));

  const Cache& cache = caches_[static_cast<size_t>(chunk.layer)];
  DenseAttentionParams params{
      .q = rows(chunk.q, chunk.tokens, heads, dim),
      .k = pages(cache.k),
      .v = pages(cache.v),
      .batch = {.cu_seqlens_q = ints(probe_lengths_, 0, probes + 1),
                .seq_lens = ints(probe_lengths_, probes + 1, probes),
                .page_table = tensor(page_table_.data(), DType::kI32, {probes, page_count_})},
      .o = tensor(probe_o_.data(), DType::kF32, {probes, heads, dim}),
      .lse = tensor(probe_lse_.data(), DType::kF32, {probes, heads})};
  params.q.data = params.q.at<std::byte>() + (start - chunk.first) * heads * dim * size_of(dtype_);
  params.q.shape[0] = probes;
  params.q.stride[0] = kProbeStep * heads * dim;
  params.batch.page_table.stride[0] = 0;
  MSA_TRY(run_operator(probe_, params));

  std::vector<float> sparse(static_cast<size_t>(heads)), dense(sparse.size());
  Mass& mass = mass_[static_cast<size_t>(chunk.layer)];
  for (int64_t i = 0; i < probes; ++i) {
    const int64_t row = start + i * kProbeStep - chunk.first;
    compute_->copy(sparse.data(), lse_.f32() + row * heads, heads * 4);
    compute_->copy(dense.data(), probe_lse_.f32() + i * heads, heads * 4);
    for (size_t h = 0; h < sparse.size(); ++h)
      mass.sum += std::exp(static_cast<double>(sparse[h]) - static_cast<double>(dense[h]));
    mass.count += heads;
  }
  return {};
}

TensorView SequenceAttention::tensor(void* data, DType dtype,
                                     std::initializer_list<int64_t> shape) const {
  TensorView view = TensorView::contiguous(data, dtype, shape);
  view.device = compute_->device();
  return view;
}

TensorView SequenceAttention::ints(const Buffer& buffer, int64_t offset, int64_t count) const {
  return tensor(static_cast<int32_t*>(buffer.data()) + offset, DType::kI32, {count});
}

TensorView SequenceAttention::rows(void* data, int64_t tokens, int64_t heads, int64_t dim) const {
  return tensor(data, dtype_, {tokens, heads, dim});
}

TensorView SequenceAttention::pages(const Buffer& pool) const {
  return tensor(pool.data(), dtype_,
                {page_count_, config_->heads_kv, config_->block_size, config_->head_dim});
}

TensorView SequenceAttention::index_pages(const Buffer& pool) const {
  return tensor(pool.data(), dtype_, {page_count_, config_->block_size, config_->index_dim});
}

Batch SequenceAttention::batch(const Chunk& chunk) {
  const std::array<int32_t, 3> lengths{0, static_cast<int32_t>(chunk.tokens),
                                       static_cast<int32_t>(chunk.first + chunk.tokens)};
  compute_->copy(lengths_.data(), lengths.data(), sizeof lengths);
  return {.cu_seqlens_q = ints(lengths_, 0, 2),
          .seq_lens = ints(lengths_, 2, 1),
          .page_table = tensor(page_table_.data(), DType::kI32, {1, page_count_})};
}

template <class Params>
Status SequenceAttention::run_operator(const Plan& plan, const Params& params) {
  return msa::run(plan, params, {workspace_.data(), static_cast<size_t>(workspace_.bytes())},
                  compute_->queue());
}

template <class Params>
Status SequenceAttention::time_operator(const Plan& plan, const Params& params, double* seconds) {
  MSA_TRY(compute_->wait());
  const Stopwatch timer(seconds);
  MSA_TRY(run_operator(plan, params));
  return compute_->wait();
}

}  // namespace msa::model
