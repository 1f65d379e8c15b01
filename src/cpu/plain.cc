#include "cpu/plain.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/half.h"
#include "core/text.h"
#include "cpu/generic/tile.h"

namespace msa::cpu {

void TopK::clear() {
  *count = 0;
  *threshold = capacity > 0 ? -kInfinity : kInfinity;
}

void TopK::insert(float score, int32_t id) {
  int32_t at = *count < capacity ? (*count)++ : capacity - 1;
  for (; at > 0 && scores[at - 1] < score; --at) {
    scores[at] = scores[at - 1];
    ids[at] = ids[at - 1];
  }
  scores[at] = score;
  ids[at] = id;
  if (*count == capacity) *threshold = scores[capacity - 1];
}

Forced forced_blocks(const Problem& problem, int64_t local) {
  return {problem.init_blocks, std::max<int64_t>(0, local + 1 - problem.local_blocks), local + 1};
}

int32_t count_forced(const Forced& forced, int64_t begin, int64_t end) {
  const auto overlap = [&](int64_t from, int64_t to) {
    return std::max<int64_t>(0, std::min(to, end) - std::max(from, begin));
  };
  return static_cast<int32_t>(
      overlap(0, forced.init_end) +
      overlap(std::max(forced.local_begin, forced.init_end), forced.local_end));
}

void finish_topk(const TopK& top, const Forced& forced, int64_t begin, int64_t end, int32_t k,
                 int32_t* ids, float* scores) {
  int32_t used = 0;
  const auto put = [&](int32_t id, float score) {  // insertion keeps the list ascending
    int32_t at = used++;
    for (; at > 0 && ids[at - 1] > id; --at) {
      ids[at] = ids[at - 1];
      if (scores != nullptr) scores[at] = scores[at - 1];
    }
    ids[at] = id;
    if (scores != nullptr) scores[at] = score;
  };
  for (int32_t i = 0; i < *top.count; ++i) put(top.ids[i], top.scores[i]);
  for (int64_t j = begin; j < std::min(end, forced.init_end); ++j)
    put(static_cast<int32_t>(j), kInfinity);
  for (int64_t j = std::max({begin, forced.local_begin, forced.init_end});
       j < std::min(end, forced.local_end); ++j) {
    put(static_cast<int32_t>(j), kInfinity);
  }
  // What scored -inf was not kept: the lowest missing ids fill up.
  const auto wanted = static_cast<int32_t>(std::min<int64_t>(k, std::max<int64_t>(0, end - begin)));
  for (int64_t j = begin; j < end && used < wanted; ++j) {
    bool listed = false;
    for (int32_t i = 0; i < used && !listed; ++i) listed = ids[i] == j;
    if (!listed) put(static_cast<int32_t>(j), -kInfinity);
  }
  for (int32_t i = used; i < k; ++i) {
    ids[i] = -1;
    if (scores != nullptr) scores[i] = -kInfinity;
  }
}

int64_t tile_lists(const TensorView& ids, int64_t head, const Sequence& s, int64_t q0, int64_t nq,
                   int64_t slot0, int64_t slot1, int64_t* pairs) {
  int64_t count = 0;
  for (int64_t i = 0; i < nq; ++i) {
    const int32_t* list = ids.at<const int32_t>(head, s.q_begin + q0 + i);
    const int64_t visible = s.visible_blocks(q0 + i);
    for (int64_t slot = 0; slot < slot1 && list[slot] >= 0; ++slot) {
      const int64_t j = list[slot] - s.block0;
      if (slot >= slot0 && j >= 0 && j < visible) pairs[count++] = j << 32 | i;
    }
  }
  std::sort(pairs, pairs + count);
  return count;
}

// ---- operators ----------------------------------------------------------------------------------

Status check_team(const Plan& plan, const Queue& queue) {
  if (queue.threads == nullptr || queue.threads->count() <= plan.limits.max_threads) return {};
  return invalid("queue.threads: got ", queue.threads->count(), " threads, the plan allows ",
                 plan.limits.max_threads, " (Limits::max_threads)");
}

void merge(const Plan&, const MergeParams& a, Workspace, Queue queue) {
  const int64_t parts = a.lse_parts.shape[0], tokens = a.lse_parts.shape[1],
                heads = a.lse_parts.shape[2];
  const int64_t dim = a.o_parts.shape[3];
  for_each_task(queue, tokens, [&](int64_t t, int) {
    for (int64_t h = 0; h < heads; ++h) {
      float top = -kInfinity;
      for (int64_t i = 0; i < parts; ++i) {
        const float part = *a.lse_parts.at<const float>(i, t, h);
        if (part > top || std::isnan(part)) top = part;  // NaN stays
      }
      float sum = 0;
      for (int64_t i = 0; i < parts && top != -kInfinity; ++i)
        sum += std::exp(*a.lse_parts.at<const float>(i, t, h) - top);
      for (int64_t d0 = 0; d0 < dim; d0 += 64) {  // slices that stay in registers or L1
        float o[64]{};
        const int64_t n = std::min<int64_t>(64, dim - d0);
        for (int64_t i = 0; i < parts; ++i) {
          const float part = *a.lse_parts.at<const float>(i, t, h);
          if (part == -kInfinity) continue;
          const float weight = std::exp(part - top) / sum;
          const int64_t from = a.o_parts.offset(i, t, h, d0);
          for (int64_t d = 0; d < n; ++d)
            o[d] += weight * load_f32(a.o_parts.data, a.o_parts.dtype, from + d);
        }
        const int64_t to = a.o.offset(t, h, d0);
        for (int64_t d = 0; d < n; ++d) store_f32(a.o.data, a.o.dtype, to + d, o[d]);
      }
      if (a.lse.given()) *a.lse.at<float>(t, h) = top == -kInfinity ? top : top + std::log(sum);
    }
  });
}

void block_lists(const Plan& plan, const BlockListsParams& a, Workspace, Queue queue) {
  const int64_t heads = a.block_ids.shape[0], slots = a.block_ids.shape[2],
                block_size = plan.problem.block_size;
  const int64_t batch = batch_size(a.batch), total = a.row_ptr.shape[1] - 1;
  for_each_task(queue, heads, [&](int64_t h, int) {
    int32_t* row_ptr = a.row_ptr.at<int32_t>(h);
    int32_t* entries = a.entries.at<int32_t>(h);
    // Counting sort in two passes over the lists; row_ptr[j + 1] first counts, then becomes the
    // next free entry of j.
    const auto each_entry = [&](const auto& visit) {
      int64_t first_block = 0;
      for (int64_t b = 0; b < batch; ++b) {
        const Sequence s = sequence(a.batch, b, block_size);
        for (int64_t t = s.q_begin; t < s.q_begin + s.q_len; ++t) {
          const int32_t* list = a.block_ids.at<const int32_t>(h, t);
          for (int64_t slot = 0; slot < slots && list[slot] >= 0; ++slot) {
            const int64_t j = list[slot] - s.block0;
            if (j >= 0 && j < s.blocks())
              visit(first_block + j, static_cast<int32_t>(t * slots + slot));
          }
        }
        first_block += s.blocks();
      }
    };
    std::fill(row_ptr, row_ptr + total + 1, 0);
    each_entry([&](int64_t j, int32_t) { ++row_ptr[j + 1]; });
    for (int64_t j = 0; j < total; ++j) row_ptr[j + 1] += row_ptr[j];
    const int32_t used = row_ptr[total];
    each_entry([&](int64_t j, int32_t entry) { entries[row_ptr[j]++] = entry; });
    for (int64_t j = total; j > 0; --j) row_ptr[j] = row_ptr[j - 1];
    row_ptr[0] = 0;
    std::fill(entries + used, entries + a.entries.shape[1], -1);
  });
}

namespace {

void append_paged(const Plan& plan, const AppendPagedParams& a, Workspace, Queue queue) {
  const int64_t block_size = plan.problem.block_size;
  for_each_task(queue, batch_size(a.batch), [&](int64_t b, int) {
    const Sequence s = sequence(a.batch, b, block_size);
    const auto copy_rows = [&](const TensorView& from, const TensorView& to, int64_t heads) {
      const auto bytes =
          static_cast<size_t>(from.shape[static_cast<size_t>(from.rank) - 1] * size_of(from.dtype));
      for (int64_t i = std::max<int64_t>(0, s.q_len - s.kv_len); i < s.q_len; ++i) {
        const int64_t at = s.kv_len - s.q_len + i;
        for (int64_t h = 0; h < heads; ++h) {
          const BlockRows rows = block_rows(to, s, at / block_size, h);
          const int64_t offset = at % block_size * rows.token_stride * size_of(to.dtype);
          const int64_t source =
              from.rank == 3 ? from.offset(s.q_begin + i, h) : from.offset(s.q_begin + i);
          std::memcpy(const_cast<std::byte*>(rows.data) + offset,
                      static_cast<const std::byte*>(from.data) + source * size_of(from.dtype),
                      bytes);
        }
      }
    };
    if (a.k.given()) copy_rows(a.k, a.k_pages, plan.problem.heads_kv);
    if (a.v.given()) copy_rows(a.v, a.v_pages, plan.problem.heads_kv);
    if (a.k_idx.given()) copy_rows(a.k_idx, a.k_idx_pages, 1);
  });
}

int64_t select_blocks_bytes(const Problem& problem, const Limits& limits) {
  return limits.max_threads * ((int64_t{problem.topk} * 8 + 127) / 64 * 64);
}

void select_blocks(const Plan& plan, const SelectBlocksParams& a, Workspace workspace,
                   Queue queue) {
  const Problem& p = plan.problem;
  const int64_t heads = a.scores.shape[0], tokens = a.scores.shape[1], blocks = a.scores.shape[2];
  const int64_t slice = select_blocks_bytes(p, {.max_threads = 1});
  for_each_task(queue, tokens, [&](int64_t t, int worker) {
    auto* memory = static_cast<std::byte*>(workspace.data) + worker * slice;
    int32_t count = 0;
    float threshold = 0;
    const int64_t valid =
        a.num_valid_blocks.given()
            ? std::clamp<int64_t>(*a.num_valid_blocks.at<const int32_t>(t), 0, blocks)
            : blocks;
    const Forced forced = forced_blocks(p, valid - 1);
    TopK top{reinterpret_cast<float*>(memory), reinterpret_cast<int32_t*>(memory) + p.topk, &count,
             &threshold, p.topk - count_forced(forced, 0, valid)};
    for (int64_t h = 0; h < heads; ++h) {
      top.clear();
      for (int64_t j = 0; j < valid; ++j) {
        const float score = *a.scores.at<const float>(h, t, j);
        if (score > threshold && !forced.contains(j)) top.insert(score, static_cast<int32_t>(j));
      }
      finish_topk(top, forced, 0, valid, p.topk, a.block_ids.at<int32_t>(h, t), nullptr);
    }
  });
}

/// The best so far in a list, best first.
void merge_lists(const Plan& plan, const MergeListsParams& a, Workspace workspace, Queue queue) {
  struct Entry {
    float score;
    int32_t id;
  };
  const auto better = [](const Entry& x, const Entry& y) {
    return x.score > y.score || (x.score == y.score && x.id < y.id);
  };
  const int64_t k = plan.problem.topk, heads = a.block_ids.shape[0];
  const int64_t slice = select_blocks_bytes(plan.problem, {.max_threads = 1});
  for_each_task(queue, a.block_ids.shape[1], [&](int64_t t, int worker) {
    auto* best = reinterpret_cast<Entry*>(static_cast<std::byte*>(workspace.data) + worker * slice);
    for (int64_t h = 0; h < heads; ++h) {
      int64_t count = 0;
      for (int64_t i = 0; i < a.scores_parts.shape[0] * k; ++i) {
        const float score = *a.scores_parts.at<const float>(i / k, h, t, i % k);
        const Entry entry{std::isnan(score) ? -kInfinity : score,
                          *a.block_ids_parts.at<const int32_t>(i / k, h, t, i % k)};
        if (entry.id < 0 || (count == k && !better(entry, best[k - 1]))) continue;
        int64_t at = count < k ? count++ : k - 1;
        for (; at > 0 && better(entry, best[at - 1]); --at) best[at] = best[at - 1];
        best[at] = entry;
      }
      std::sort(best, best + count, [](const Entry& x, const Entry& y) { return x.id < y.id; });
      std::fill(best + count, best + k, Entry{-kInfinity, -1});
      for (int64_t slot = 0; slot < k; ++slot) {
        *a.block_ids.at<int32_t>(h, t, slot) = best[slot].id;
        if (a.scores.given()) *a.scores.at<float>(h, t, slot) = best[slot].score;
      }
    }
  });
}

template <class Params, void (*Compute)(const Plan&, const Params&, Workspace, Queue)>
Status run(const Plan& plan, const ParamsRef& params, Workspace workspace, Queue queue) {
  MSA_TRY(check_team(plan, queue));
  Compute(plan, params.as<Params>(), workspace, queue);
  return {};
}

Refusal list_fits(const Problem& p, const Limits&) {
  return p.topk <= kMaxTopK ? Refusal{} : Refusal{"topk", nullptr, p.topk, "1..256"};
}

constexpr Kernel kKernels[] = {
    {.op = Op::kSelectBlocks,
     .name = "plain",
     .fits = list_fits,
     .workspace_bytes = select_blocks_bytes,
     .run = run<SelectBlocksParams, select_blocks>},
    {.op = Op::kMerge, .name = "plain", .run = run<MergeParams, merge>},
    {.op = Op::kMergeLists,
     .name = "plain",
     .workspace_bytes = select_blocks_bytes,
     .run = run<MergeListsParams, merge_lists>},
    {.op = Op::kBlockLists, .name = "plain", .run = run<BlockListsParams, block_lists>},
    {.op = Op::kAppendPaged, .name = "plain", .run = run<AppendPagedParams, append_paged>},
};

}  // namespace

std::span<const Kernel> plain_kernels() { return kKernels; }

}  // namespace msa::cpu
