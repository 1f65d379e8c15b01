// What a result must be: the reference in fp64, and how far from it rounding may lead.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "conformance/instance.h"
#include "msa/msa.h"

namespace msa::conformance {

/// What a comparison found.
struct Verdict {
  std::string failure;   ///< the first thing that is wrong; empty = ok
  double max_error = 0;  ///< largest error relative to the largest element of its row
  bool ok() const { return failure.empty(); }
};

/// Largest legal |got - want| of an element in a row whose largest finite |want| is `magnitude`:
/// absolute + row * magnitude + element * |want|.
struct Tolerance {
  double absolute = 0;
  double row = 0;
  double element = 0;
  double cosine = -1;  ///< the least cosine between the two rows
};

/// The outputs the specification demands for one set of arguments.
struct Expected {
  Problem problem;
  Limits limits;
  Params params;               ///< the arguments, with outputs of our own: f32 or i32
  IndexSelectParams chosen{};  ///< of operators that choose blocks: their choice, and its scores
  IndexScoresParams scores{};  ///< of the same: the score of every block
  double norms = 0;            ///< largest |q| times largest |k|, of the index branch if it has one
  std::vector<std::vector<double>> memory{};
};

/// Runs the fp64 reference. The arguments must stay alive; their outputs are not touched, but those
/// of append_paged say what was in the pages before.
Status expect(const Problem& problem, const Limits& limits, const Params& params, Threads* threads,
              Expected* out);

struct Conditions {
  bool exact_scores = false;   ///< products and sums are exact in fp32: ties are ties
  bool exact_softmax = false;  ///< logits too, and so far apart that only the largest count
  SequenceSize spoiled{};      ///< the first sequence, if its gradients and kl may be anything
  bool rounds_probabilities = false;  ///< the backend multiplies by 16-bit probabilities
};

/// As msa::plan, for backends that need not be on its list; tensors are where it wants them.
Plan plan_on(const Backend& backend, Problem problem, const Limits& limits);
Status supported_on(const Backend& backend, Problem problem, const Limits& limits);

/// True where a kernel of the plan multiplies by probabilities that are rounded to bf16.
bool rounds_probabilities(const Plan& plan);

/// What addresses and strides of 16-bit tensors must be a multiple of, in bytes, for the plan's
/// best kernels to be used.
int64_t alignment(const Plan& plan);

/// Judges outputs computed from the same arguments.
Verdict judge(const Expected& expected, const Params& got, const Conditions& conditions);

/// `bytes` of 64-byte aligned memory inside `memory`, which grows as needed.
std::byte* make_workspace(size_t bytes, std::vector<double>* memory);

/// Compares along the last axis, row by row: places of NaN and infinities first, then errors.
void compare_rows(const char* name, const TensorView& got, const TensorView& want,
                  const Tolerance& tolerance, Verdict* verdict);

/// Every element bit for bit.
void compare_exactly(const char* name, const TensorView& got, const TensorView& want,
                     Verdict* verdict);

/// Lists of the best blocks. Where they differ, the scores of the blocks in question must be
/// nearer to each other than `tolerance`.
///   want, want_scores  [Hi,T,K], +inf where forced
///   scores             [Hi,T,blocks]; column 0 is block first_block[t]
void compare_ids(const TensorView& got, const TensorView& want, const TensorView& want_scores,
                 const TensorView& scores, const std::vector<int64_t>& first_block,
                 double tolerance, Verdict* verdict);

}  // namespace msa::conformance
