// The operators as `msa bench` calls them: random inputs, one call to time, one verdict.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "conformance/device.h"
#include "conformance/tensors.h"
#include "core/op_table.h"
#include "model/safetensors.h"
#include "msa/arrays.h"
#include "msa/cuda_timer.h"
#include "msa/msa.h"
#include "msa/verdict.h"

namespace msa::cli {

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
};

/// One operator bound to a backend and to data.
struct Operation {
  std::string op;
  const Backend* backend = nullptr;
  std::string kernel;  ///< what the call runs on
  conformance::Params params;
  Cost cost{};
  /// On a device the work is enqueued only, and the data exists in `copies` copies that may be
  /// used in turn: together they do not fit into its L2 cache. A CPU has one.
  std::function<Status(int copy)> run;
  int copies = 1;
  std::function<Status(Verdict*)> verify;  ///< of the outputs of the last run of copy 0
};

/// The data of one setting, made when an operation first needs it, and shared by all of them. It
/// lies in host memory, and for a CUDA backend on the device as well.
class Workload {
 public:
  /// device: null for the CPU.
  Workload(const Setting& setting, Threads& threads, CudaTimer* device)
      : setting_(setting), threads_(threads), device_(device) {}
  Workload(const Workload&) = delete;
  Workload& operator=(const Workload&) = delete;

  /// Binds an operation: `msa` or a name of the library's. Errors: what no backend supports; a
  /// trace that does not fit.
  Status add(const std::string& name, Operation* out);
  /// Overwrites every output (of copy 0), so that a verdict judges the very next run.
  Status poison_outputs();

 private:
  using Verify = std::function<Status(Verdict*)>;

  // Data (bench_data.cc): made on first use, by name.
  TensorView input(const std::string& name, std::vector<int64_t> shape, DType dtype);
  TensorView output(const std::string& name, DType dtype, std::vector<int64_t> shape);
  TensorView metadata(const std::string& name, const std::function<std::vector<int32_t>()>& make);
  Batch batch();
  TensorView visible_blocks();
  TensorView distinct_lists(const std::string& name, const std::vector<int64_t>& shape);

  // Their copies on the device.
  Status on_device(const TensorView& host, int copy, TensorView* out);
  Status on_device(const conformance::Params& host, int copy, conformance::Params* out);
  Status fetch(conformance::Params params);
  int copies_beyond_l2(double bytes_of_one_call) const;

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
  int64_t extent(std::string_view letter) const;
  Status argument(Op op, const Argument& a, TensorView* out);
  Status result_of(Op op, std::string_view name, TensorView* out);
  Status bind(Op op, Operation* out);
  Status bind_on_device(const Plan& plan, Operation* out);
  Status bind_msa(Operation* out);
  Verify verify_whole(Op op, const Operation& of);
  Verify verify_rows(Op op, const Operation& of);
  Verify verify_gradients(Op op, const Operation& of);
  template <class Judge>
  Status each_sample(int64_t count, Verdict* worst, const Judge& judge);
  conformance::Params row_of(const conformance::Params& params, int64_t row,
                             const Batch& batch) const;
  Problem problem(Op op) const;
  Limits limits() const;

  Setting setting_;
  Threads& threads_;
  CudaTimer* device_;
  std::map<std::string, Array> arrays_;
  std::map<std::pair<std::string, int>, conformance::DeviceMemory> copies_;  ///< of an array
};

}  // namespace msa::cli
