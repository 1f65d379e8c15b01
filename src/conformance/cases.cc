#include "conformance/cases.h"

#include <algorithm>
#include <array>
#include <functional>

#include "conformance/random.h"

namespace msa::conformance {
namespace {

/// How often an operator is tried for each dtype and layout.
struct Share {
  Op op;
  int full;
  int smoke;
  bool packed;
  bool paged;
  bool step = false;  ///< decoding steps
};
constexpr Share kShares[] = {
    {Op::kIndexScores, 36, 3, true, true},
    {Op::kSelectBlocks, 30, 10, true, false},
    {Op::kIndexSelect, 60, 5, true, true},
    {Op::kSparseAttention, 64, 4, true, true},
    {Op::kSparseAttention, 72, 4, false, true, true},
    {Op::kDenseAttention, 56, 3, true, true},
    {Op::kMerge, 24, 3, true, false},
    {Op::kBlockLists, 20, 2, true, true},
    {Op::kAppendPaged, 36, 3, false, true},
    {Op::kBlockMass, 32, 2, true, true},
    {Op::kSparseAttentionBackward, 48, 4, true, false},
    {Op::kDenseAttentionBackward, 32, 3, true, false},
    {Op::kIndexLse, 24, 2, true, false},
    {Op::kKlBackward, 40, 4, true, false},
    {Op::kKlLoss, 16, 2, true, false},
    {Op::kLayer, 48, 3, false, true, true},
};

/// What chance would rarely make: the same operators again, each case changed.
struct Special {
  std::function<void(Case&)> change;
  std::vector<Share> shares;
};

std::vector<Special> specials() {
  const auto giant = [](Case& c) {
    c.values = Values::kGiant;
    if (is_training(c.problem.op)) c.f32_outputs = true;  // f16 does not hold such gradients
  };
  const auto non_finite = [](Case& c) { c.values = Values::kNonFinite; };
  const auto repeated = [](Case& c) {
    c.repeated_ids = true;
    c.problem.topk = std::max(c.problem.topk, 2);
  };
  const auto full = [](Case& c) { c.causal = false; };
  return {
      {giant,
       {{Op::kSparseAttention, 4, 1, true, true},
        {Op::kSparseAttention, 3, 1, false, true, true},
        {Op::kDenseAttention, 4, 1, true, true},
        {Op::kMerge, 3, 1, true, false},
        {Op::kBlockMass, 3, 1, true, true},
        {Op::kSparseAttentionBackward, 3, 1, true, false},
        {Op::kDenseAttentionBackward, 3, 1, true, false},
        {Op::kIndexLse, 3, 1, true, false},
        {Op::kKlBackward, 3, 1, true, false},
        {Op::kKlLoss, 2, 1, true, false},
        {Op::kLayer, 2, 1, false, true, true}}},
      {non_finite,
       {{Op::kSparseAttention, 5, 1, true, true},
        {Op::kSparseAttention, 4, 1, false, true, true},
        {Op::kDenseAttention, 5, 1, true, true},
        {Op::kSparseAttentionBackward, 4, 1, true, false},
        {Op::kDenseAttentionBackward, 4, 1, true, false},
        {Op::kKlBackward, 4, 1, true, false},
        {Op::kKlLoss, 3, 1, true, false}}},
      {repeated,
       {{Op::kSparseAttention, 3, 1, true, true},
        {Op::kSparseAttention, 3, 1, false, true, true},
        {Op::kBlockLists, 3, 1, true, true},
        {Op::kSparseAttentionBackward, 3, 1, true, false},
        {Op::kIndexLse, 3, 1, true, false},
        {Op::kKlBackward, 3, 1, true, false},
        {Op::kKlLoss, 2, 1, true, false}}},
      {full, {{Op::kIndexSelect, 6, 1, true, true}, {Op::kLayer, 4, 1, false, true, true}}},
      // Behind the others, which keep their seeds.
      {[](Case&) {}, {{Op::kLayer, 20, 2, true, true}, {Op::kMergeLists, 24, 4, true, false}}},
  };
}

// Multiply-adds that the fp64 judge spends on a case, half a nanosecond each: nearly all cases are
// small, one in twenty is large enough to cross the tiles of fast kernels several times.
constexpr int64_t kSmallWork = 12'000'000;
constexpr int64_t kLargeWork = 120'000'000;

const char* name_of(Values values) {
  constexpr std::array names = {"normal", "ties",   "equal",   "zero",      "huge",
                                "peaked", "rising", "falling", "nonfinite", "giant"};
  return names[static_cast<size_t>(values)];
}

bool is_attention_op(Op op) {
  return op == Op::kSparseAttention || op == Op::kLayer || op == Op::kDenseAttention ||
         op == Op::kBlockMass || is_training(op);
}

/// Shapes: mostly what models use, and now and then what nobody does. `variant` walks through all
/// group sizes.
Problem make_problem(Op op, DType dtype, KvLayout layout, int variant, Rng& rng) {
  Problem p{.op = op, .dtype = dtype, .layout = layout};
  const int32_t group = (variant * 5 + static_cast<int>(op)) % 16 + 1;
  p.heads_kv = group > 8 ? rng.pick({1, 1, 2}) : rng.pick({1, 2, 2, 3, 4});
  p.heads_q = group * p.heads_kv;
  p.head_dim = rng.pick({64, 64, 64, 128, 128, 128, 128, 16});
  p.index_dim = rng.pick({64, 64, 128, 128, 128, 128, 16});
  p.block_size = rng.pick({8, 16, 32, 32, 64, 64, 64, 128, 128, 128});
  p.topk = rng.pick({1, 2, 3, 4, 4, 5, 6, 8, 8, 8, 12, 16, 16, 24, 32});
  if (rng.chance(4)) {
    p.head_dim = p.index_dim = rng.pick({1, 24, 40, 80, 96, 192, 256});
    p.block_size = rng.pick({1, 5, 24, 48, 96, 100, 256});
    p.topk = rng.pick({7, 33, 48});
  }
  if (rng.chance(30)) {
    p.local_blocks = static_cast<int32_t>(rng.between(0, std::min(3, p.topk)));
    p.init_blocks = static_cast<int32_t>(rng.between(0, std::min(3, p.topk - p.local_blocks)));
  }
  return p;
}

Values make_values(Op op, Rng& rng) {
  if (is_index_op(op)) {
    return rng.pick({Values::kNormal, Values::kNormal, Values::kNormal, Values::kTies,
                     Values::kTies, Values::kEqual, Values::kZero, Values::kHuge,
                     Values::kNonFinite, Values::kRising});
  }
  return rng.pick({Values::kNormal, Values::kNormal, Values::kNormal, Values::kTies, Values::kEqual,
                   Values::kZero, Values::kHuge, Values::kPeaked, Values::kRising,
                   Values::kFalling});
}

/// A key length up to `max`, often at the border of a block.
int64_t make_kv_len(int64_t max, int64_t block, Rng& rng) {
  if (rng.chance(8)) return rng.pick<int64_t>({0, 1, 1, 2});
  if (rng.chance(50)) {
    const int64_t blocks = rng.between(1, std::max<int64_t>(1, max / block));
    return std::max<int64_t>(1, blocks * block + rng.between(-1, 1));
  }
  return rng.between(1, max);
}

/// Query tokens: one, a chunk, or the whole context, as far as `pairs` (query, key) pairs allow.
int64_t make_q_len(int64_t kv_len, int64_t pairs, Rng& rng) {
  const int64_t most = std::clamp<int64_t>(pairs / std::max<int64_t>(kv_len, 1), 1, 320);
  if (rng.chance(5)) return rng.between(0, 1);
  if (rng.chance(4)) return std::min(most, kv_len + rng.between(1, 3));  // more queries than keys
  const int64_t q_len = rng.chance(60) ? most : rng.between(1, most);
  return std::min(q_len, std::max<int64_t>(kv_len, 1));
}

std::vector<SequenceSize> make_sequences(const Case& c, Rng& rng) {
  const Problem& p = c.problem;
  const int64_t block = p.block_size;
  int64_t count = c.step ? rng.between(1, 5) : rng.pick<int64_t>({1, 1, 1, 2, 3, 4});
  if (c.first_sequence_spoiled()) count += 1;
  const int64_t work = rng.chance(5) ? kLargeWork : kSmallWork;
  const int64_t per_pair = is_training(p.op)       ? int64_t{10} * p.heads_q * p.head_dim
                           : is_attention_op(p.op) ? int64_t{2} * p.heads_q * p.head_dim
                                                   : int64_t{p.heads_kv} * p.index_dim;
  const int64_t pairs = std::max<int64_t>(1, work / per_pair / count);
  // Enough blocks that the best K are a choice, or fewer than K.
  const int64_t blocks = rng.chance(70) ? p.topk + rng.between(1, 8) : rng.between(1, 6);
  const int64_t max_kv = std::clamp<int64_t>(blocks * block, 1, rng.chance(10) ? 4096 : 1200);

  std::vector<SequenceSize> sequences;
  for (int64_t b = 0; b < count; ++b) {
    int64_t kv_len = make_kv_len(max_kv, block, rng);
    int64_t q_len =
        c.step ? rng.pick<int64_t>({1, 1, 1, 2, 3, 4, 8, 16}) : make_q_len(kv_len, pairs, rng);
    if (p.op == Op::kAppendPaged) q_len = rng.between(0, kv_len);
    if (c.step && kv_len > 0) q_len = std::min(q_len, kv_len);
    const int64_t block_offset = c.block_offsets ? rng.between(0, 3) : 0;
    const int64_t begin = block_offset * block;
    const int64_t q_offset = rng.between(std::max<int64_t>(0, begin - 2 * block),
                                         begin + kv_len + rng.pick<int64_t>({0, block}));
    sequences.push_back({static_cast<int32_t>(q_len), static_cast<int32_t>(kv_len),
                         static_cast<int32_t>(q_offset), static_cast<int32_t>(block_offset)});
  }
  return sequences;
}

std::string make_name(const Case& c) {
  const Problem& p = c.problem;
  const auto number = [](const char* letter, int64_t value) {
    return letter + std::to_string(value);
  };
  std::string name = std::string(msa::name_of(p.dtype)) +
                     (p.layout == KvLayout::kPaged ? "/paged" : "/packed") +
                     number("/Hkv", p.heads_kv) + number(".G", p.group()) +
                     number(".D", is_index_op(p.op) ? p.index_dim : p.head_dim) +
                     number(".Bk", p.block_size) + number(".K", p.topk) + "/" + name_of(c.values);
  for (const SequenceSize& s : c.sequences) name += number("/", s.q_len) + number("x", s.kv_len);
  if (p.init_blocks != 0 || p.local_blocks != 1)
    name += number("/init", p.init_blocks) + number(".local", p.local_blocks);
  if (c.step) name += "/step";
  if (c.strided) name += "/strided";
  if (!c.causal) name += "/full";
  if (c.q_offsets) name += "/q_offset";
  if (c.block_offsets) name += "/shard";
  if (c.pages == PageForm::kRowsOfTable) name += "/page_rows";
  if (c.pages == PageForm::kFlatList) name += "/flat_pages";
  if (c.shared_ids) name += "/shared_ids";
  if (c.repeated_ids) name += "/repeated_ids";
  if (c.f32_outputs) name += "/f32_out";
  if (c.padded_rows > 0) name += "/padded";
  return name;
}

Case make_case(const Share& share, DType dtype, KvLayout layout, int variant, uint64_t seed,
               const std::function<void(Case&)>& change) {
  Rng rng(seed);
  Case c;
  c.seed = rng.bits();
  c.problem = make_problem(share.op, dtype, layout, variant, rng);
  c.step = share.step;
  c.values = make_values(share.op, rng);
  c.strided = rng.chance(50);
  c.optional = rng.chance(70);
  c.f32_outputs = rng.chance(30);
  c.loose_limits = rng.chance(40);
  c.padded_rows = rng.chance(20) ? rng.between(1, 3) : 0;
  if (is_index_op(share.op) || is_attention_op(share.op)) {
    c.causal = !rng.chance(8);
    c.q_offsets = rng.chance(14);
  }
  if (share.op != Op::kAppendPaged) c.block_offsets = rng.chance(14);
  c.shared_ids = rng.chance(12);
  if (layout == KvLayout::kPaged && share.op != Op::kBlockLists)
    c.pages = rng.pick({PageForm::kTable, PageForm::kTable, PageForm::kTable,
                        PageForm::kRowsOfTable, PageForm::kFlatList});
  change(c);
  c.sequences = make_sequences(c, rng);
  c.name = make_name(c) + "#" + std::to_string(variant);
  return c;
}

}  // namespace

bool is_index_op(Op op) {
  return op == Op::kIndexScores || op == Op::kSelectBlocks || op == Op::kIndexSelect ||
         op == Op::kMergeLists;
}

bool Case::first_sequence_spoiled() const {
  return values == Values::kNonFinite && is_training(problem.op);
}

int64_t Case::tokens() const {
  int64_t sum = padded_rows;
  for (const SequenceSize& s : sequences) sum += s.q_len;
  return sum;
}

std::vector<Case> make_cases(Suite suite) {
  std::vector<Case> cases;
  uint64_t seed = 2606'13392;
  const auto add = [&](const Share& share, const std::function<void(Case&)>& change) {
    for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
      for (KvLayout layout : {KvLayout::kPacked, KvLayout::kPaged}) {
        if (!(layout == KvLayout::kPacked ? share.packed : share.paged)) continue;
        for (int variant = 0; variant < share.full; ++variant) {
          const Case c = make_case(share, dtype, layout, variant, ++seed, change);
          if (suite == Suite::kFull || variant < share.smoke) cases.push_back(c);
        }
      }
    }
  };
  for (const Share& share : kShares) add(share, [](Case&) {});
  for (const Special& special : specials())
    for (const Share& share : special.shares) add(share, special.change);
  return cases;
}

}  // namespace msa::conformance
