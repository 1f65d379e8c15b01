// Backends are values in a list; plan() chooses one, run() computes.
//
//   msa::Plan plan;
//   MSA_TRY(msa::plan(problem, limits, &plan));              // host arithmetic only
//   void* memory = ...;                                       // plan.workspace_bytes, 64-aligned
//   MSA_TRY(msa::run(plan, params, {memory, bytes}, {.threads = &threads}));
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>

#include "msa/export.h"
#include "msa/ops.h"
#include "msa/problem.h"
#include "msa/status.h"

namespace msa MSA_API {

/// A fixed team of CPU threads. Creating one allocates and starts threads; using one does neither.
/// One call at a time may use a team; results never depend on its size.
class Threads {
 public:
  /// `count` workers, the calling thread among them; 0 = as many as the machine runs at once. Fewer
  /// where the system refuses to start more.
  explicit Threads(int count = 0);
  ~Threads();
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

  int count() const;
  /// Calls body(int64_t task, int worker) once for each task in [0, tasks), worker in [0, count());
  /// returns when all are done. Tasks are handed out in ascending order. The body must not throw.
  template <class Body>
  void parallel_for(int64_t tasks, const Body& body) {
    run(
        tasks,
        [](const void* context, int64_t task, int worker) {
          (*static_cast<const Body*>(context))(task, worker);
        },
        &body);
  }

 private:
  using Task = void (*)(const void* context, int64_t task, int worker);
  void run(int64_t tasks, Task task, const void* context);
  struct Team;
  std::unique_ptr<Team> team_;
};

/// Where the work is enqueued: CPU threads (null = the calling thread alone) or a CUDA stream.
struct Queue {
  Threads* threads = nullptr;
  void* cuda_stream = nullptr;
};

/// Scratch memory of the caller, at least plan.workspace_bytes, 64-byte aligned (256 on CUDA).
struct Workspace {
  void* data = nullptr;
  size_t bytes = 0;
};

class Backend;

/// An operator bound to a backend. A value: copy it, keep it, use it from many threads.
struct Plan {
  const Backend* backend = nullptr;
  Problem problem{};
  Limits limits{};
  int64_t workspace_bytes = 0;
};

/// One way to compute the operators. Instances live as long as the program.
class Backend {
 public:
  virtual ~Backend() = default;

  virtual const char* name() const = 0;         ///< "reference", "avx2", ...
  virtual const char* requirement() const = 0;  ///< what it needs, for people
  virtual int priority() const = 0;             ///< `auto` takes the highest usable one
  virtual DeviceKind device() const = 0;
  /// Ok, or kUnavailable with the reason ("needs AVX-512F; this CPU has none").
  virtual Status usable() const = 0;
  /// Ok, or kUnsupported with the field, its value and what this backend supports.
  virtual Status supports(const Problem& problem) const = 0;
  /// Scratch bytes for any call within limits.
  virtual int64_t workspace_bytes(const Problem& problem, const Limits& limits) const = 0;

  // The operators, called by msa::run with checked arguments. Never allocate, never wait.
  virtual Status run(const Plan&, const IndexScoresParams&, Workspace, Queue) const = 0;
  virtual Status run(const Plan&, const SelectBlocksParams&, Workspace, Queue) const = 0;
  virtual Status run(const Plan&, const IndexSelectParams&, Workspace, Queue) const = 0;
  virtual Status run(const Plan&, const SparseAttentionParams&, Workspace, Queue) const = 0;
  virtual Status run(const Plan&, const DenseAttentionParams&, Workspace, Queue) const = 0;
  virtual Status run(const Plan&, const MergeParams&, Workspace, Queue) const = 0;
  virtual Status run(const Plan&, const BlockListsParams&, Workspace, Queue) const = 0;
  virtual Status run(const Plan&, const AppendPagedParams&, Workspace, Queue) const = 0;
  virtual Status run(const Plan&, const BlockMassParams&, Workspace, Queue) const = 0;
  /// Unless overridden: index_select, then sparse_decode.
  virtual Status run(const Plan&, const LayerDecodeParams&, Workspace, Queue) const;
  virtual Status run(const Plan&, const AttentionBackwardParams&, Workspace, Queue) const = 0;
  virtual Status run(const Plan&, const IndexLseParams&, Workspace, Queue) const = 0;
  virtual Status run(const Plan&, const KlParams&, Workspace, Queue) const = 0;
};

/// All backends of this build, usable or not, highest priority first.
std::span<const Backend* const> backends();

/// The backend of that name, or null.
const Backend* find_backend(std::string_view name);

/// Chooses the backend for `problem`: by name, or with "auto" the one MSA_BACKEND names in the
/// environment, else the usable one of highest priority that supports the problem on its device.
/// Errors: kInvalidArgument for an unknown name (lists the known ones), kUnavailable or
/// kUnsupported with the reason of each candidate.
Status choose_backend(const Problem& problem, std::string_view name, const Backend** out);

/// Binds a problem to a backend and states the workspace. Pure host arithmetic: no device call, no
/// allocation but for error texts. Errors: those of validate() and choose_backend().
Status plan(const Problem& problem, const Limits& limits, Plan* out,
            std::string_view backend = "auto");

/// Checks the arguments once against plan, shapes, dtypes, strides and (in host memory) contents,
/// then enqueues the work. Never allocates on success, never waits for a device; on the CPU it
/// returns when done. Errors: kInvalidArgument with argument, given and expected; the outputs are
/// then untouched.
Status run(const Plan&, const IndexScoresParams&, Workspace, Queue = {});
Status run(const Plan&, const SelectBlocksParams&, Workspace, Queue = {});
Status run(const Plan&, const IndexSelectParams&, Workspace, Queue = {});
Status run(const Plan&, const SparseAttentionParams&, Workspace, Queue = {});
Status run(const Plan&, const DenseAttentionParams&, Workspace, Queue = {});
Status run(const Plan&, const MergeParams&, Workspace, Queue = {});
Status run(const Plan&, const BlockListsParams&, Workspace, Queue = {});
Status run(const Plan&, const AppendPagedParams&, Workspace, Queue = {});
Status run(const Plan&, const BlockMassParams&, Workspace, Queue = {});
Status run(const Plan&, const LayerDecodeParams&, Workspace, Queue = {});
Status run(const Plan&, const AttentionBackwardParams&, Workspace, Queue = {});
Status run(const Plan&, const IndexLseParams&, Workspace, Queue = {});
Status run(const Plan&, const KlParams&, Workspace, Queue = {});

}  // namespace msa MSA_API
