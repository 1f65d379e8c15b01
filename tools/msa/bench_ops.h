// The operators as `msa bench` calls them: random inputs, one call to time, one verdict.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "model/safetensors.h"
#include "msa/arrays.h"
#include "msa/msa.h"
#include "msa/verdict.h"

namespace msa::cli {

/// Names that --op takes: those of the library, and `msa` = index_select, then sparse attention.
std::vector<std::string> bench_op_names();

/// Block ids of a real run: tensors `layers.N.block_ids` i32 [Hi,T,K], by ascending N.
struct Trace {
  model::SafetensorsFile file;
  std::vector<TensorView> layers;
  static Status open(const std::string& path, Trace* out);
};

/// One context of one shape.
struct Setting {
  Problem problem{};  ///< shape, dtype, layout; `op` is set per operation
  std::string backend = "auto";
  int64_t context = 0;     ///< keys of a sequence, the new tokens included
  int64_t new_tokens = 0;  ///< queries of a sequence
  int64_t batch = 1;
  std::string selection = "index";  ///< index, random, or the file of `trace`
  const Trace* trace = nullptr;

  bool decode() const { return new_tokens <= 16 && new_tokens < context; }
};

/// One operator bound to a backend and to data.
struct Operation {
  std::string op;
  const Backend* backend = nullptr;
  Cost cost{};
  std::function<Status()> run;
  std::function<Status(Verdict*)> verify;  ///< of the outputs of the last run
};

/// The data of one setting, made when an operation first needs it, and shared by all of them.
class Workload {
 public:
  Workload(const Setting& setting, Threads& threads) : setting_(setting), threads_(threads) {}
  Workload(const Workload&) = delete;
  Workload& operator=(const Workload&) = delete;

  /// Binds an operation: `msa` or a name of the library's. Errors: what no backend supports; a
  /// trace that does not fit.
  Status add(const std::string& name, Operation* out);
  /// Overwrites every output, so that a verdict judges the very next run.
  void poison_outputs();

 private:
  struct Sample;
  template <class Params>
  struct Rows;

  // Data (bench_data.cc): made on first use, by name.
  TensorView input(const std::string& name, std::vector<int64_t> shape, DType dtype);
  TensorView output(const std::string& name, DType dtype, std::vector<int64_t> shape);
  TensorView metadata(const std::string& name, const std::function<std::vector<int32_t>()>& make);
  Batch batch();
  TensorView keys(const std::string& name);
  TensorView index_keys();
  TensorView q();
  TensorView q_idx();
  TensorView o();
  TensorView lse();
  TensorView visible_blocks();
  Status ids(TensorView* out);
  void random_ids(const TensorView& out);
  Status trace_ids(const TensorView& out);

  int64_t tokens() const { return setting_.batch * setting_.new_tokens; }
  int64_t blocks() const { return visible(setting_.context - 1); }
  int64_t hkv() const { return setting_.problem.heads_kv; }
  int64_t topk() const { return setting_.problem.topk; }
  /// Position of a query row inside its sequence, and the blocks visible from there.
  int64_t position(int64_t row) const {
    return setting_.context - setting_.new_tokens + row % setting_.new_tokens;
  }
  int64_t visible(int64_t pos) const { return pos / setting_.problem.block_size + 1; }

  // Operators (bench_ops.cc).
  template <class Params>
  Status bind(Op op, const Params& params, Operation* out);
  template <class Params>
  Status bind_rows(Op op, const Params& params, const Rows<Params>& rows, Operation* out);
  template <class Params>
  Status bind_whole(Op op, const Params& params, Operation* out);
  Status bind(Op op, Operation* out);
  Status bind_dense(Operation* out);
  Status bind_sparse(Op op, const TensorView& lists, Operation* out);
  Status bind_select(const TensorView& ids, Operation* out);
  Status bind_msa(Operation* out);
  Status bind_block_mass(Operation* out);
  Problem problem(Op op) const;
  Limits limits() const;

  Setting setting_;
  Threads& threads_;
  std::map<std::string, Array> arrays_;
};

}  // namespace msa::cli
