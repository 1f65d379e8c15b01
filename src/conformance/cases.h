// The generated cases: which problems are tried, and on what kind of data.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "msa/problem.h"

namespace msa::conformance {

/// What the numbers in q, k and v look like.
enum class Values {
  kNormal,
  kTies,       ///< small integers: scores are exact and often equal
  kEqual,      ///< one key, repeated
  kZero,       ///< every query is zero
  kHuge,       ///< logits in the thousands
  kPeaked,     ///< single keys far above all others
  kRising,     ///< every block raises the running maximum
  kFalling,    ///< the first block decides
  kNonFinite,  ///< NaN and infinities: in visible index keys and scores, in keys and values of
               ///< attention; of training the first sequence is nothing else
  kGiant,  ///< logits of 2^24 and more, exact and far apart; keys of equal logits have equal values
};

/// How the pages of a sequence are found.
enum class PageForm : uint8_t { kTable, kRowsOfTable, kFlatList };

/// One sequence of a batch; offsets count where the case has them.
struct SequenceSize {
  int32_t q_len = 0;
  int32_t kv_len = 0;
  int32_t q_offset = 0;
  int32_t block_offset = 0;
};

struct Case {
  std::string name;
  Problem problem;
  std::vector<SequenceSize> sequences;
  Values values = Values::kNormal;
  int64_t padded_rows = 0;  ///< rows behind the last sequence's
  bool step = false;        ///< few new tokens in each sequence, as in a decoding step
  bool strided = false;     ///< permuted axes, gaps, interleaved keys and values, odd addresses
  bool causal = true;
  bool q_offsets = false;
  bool block_offsets = false;
  PageForm pages = PageForm::kTable;
  bool shared_ids = false;    ///< one list for all heads: head stride 0
  bool repeated_ids = false;  ///< every list names a block twice
  bool f32_outputs = false;   ///< o in f32 whatever the dtype
  bool optional = false;      ///< also the outputs a caller may leave out
  bool loose_limits = false;  ///< the plan allows more than the call uses
  uint64_t seed = 0;

  int64_t tokens() const;               ///< T, padded rows included
  bool first_sequence_spoiled() const;  ///< all NaN, and so may its results be
  bool exact_scores() const {
    return values == Values::kTies || values == Values::kEqual || values == Values::kZero ||
           values == Values::kGiant;
  }
  bool exact_softmax() const { return values == Values::kGiant; }
};

bool is_index_op(Op op);

enum class Suite { kSmoke, kFull };  ///< about 360 and about 3,300 cases

/// Always the same cases in the same order.
std::vector<Case> make_cases(Suite suite);

}  // namespace msa::conformance
