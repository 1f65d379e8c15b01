// Backends are values in a list, and so are their kernels; plan() chooses, run() computes.
//
//   msa::Plan plan;
//   MSA_TRY(msa::plan(problem, limits, &plan));              // host arithmetic only
//   void* memory = ...;                                       // plan.workspace_bytes, 64-aligned
//   MSA_TRY(msa::run(plan, params, {memory, bytes}, {.threads = &threads}));
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
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

struct Backend;
struct Kernel;

/// An operator bound to a backend. A value: copy it, keep it, use it from many threads.
struct Plan {
  const Backend* backend = nullptr;
  Problem problem{};
  Limits limits{};
  int64_t workspace_bytes = 0;
  /// The backend's kernels for this problem, best first, null behind the last: a call runs on the
  /// first one that takes its arguments.
  std::array<const Kernel*, 4> kernels{};

  /// Name of the best one; "" for an empty plan.
  const char* kernel() const;
};

/// Why a kernel leaves a problem or a call to the next one; empty where it does not.
struct Refusal {
  const char* field = nullptr;  ///< of the problem, or an argument; null: nothing is refused
  const char* given = nullptr;  ///< in words; null: as a number
  int64_t value = 0;
  const char* supported = nullptr;

  explicit operator bool() const { return field != nullptr; }
  std::string text() const;  ///< "head_dim: got 300, supported: 1..256"
};

/// One way to compute one operator: plain data, in a backend's list.
struct Kernel {
  Op op;
  const char* name;  ///< "reference", "avx2", "sm90/dense", ...
  /// Null: takes every problem, every call.
  Refusal (*fits)(const Problem&, const Limits&) = nullptr;
  Refusal (*takes)(const Plan&, const ParamsRef&) = nullptr;
  /// Scratch bytes for any call within limits. Null: none.
  int64_t (*workspace_bytes)(const Problem&, const Limits&) = nullptr;
  /// Arguments are checked. Never allocates, never waits.
  Status (*run)(const Plan&, const ParamsRef&, Workspace, Queue) = nullptr;
  /// Operators of the same backend that run() calls, each with the scratch bytes of the hungriest.
  std::span<const Op> steps = {};

  /// What the conformance suite must know: whether probabilities are rounded to 16 bits before they
  /// multiply, and what addresses and strides of 16-bit rows must be a multiple of, in bytes, for a
  /// call to be taken.
  bool rounds_probabilities = false;
  int alignment = 1;
};

/// A device or instruction set with its kernels. Instances live as long as the program.
struct Backend {
  const char* name;         ///< "reference", "avx2", ...
  const char* requirement;  ///< what it needs, for people
  int priority;             ///< `auto` takes the highest usable one
  DeviceKind device;
  /// Ok, or kUnavailable with the reason ("needs AVX-512F; this CPU has none").
  Status (*usable)();
  std::span<const Kernel> kernels;  ///< of an operator, the better ones first

  /// Ok, or kUnsupported with the field, its value and what this backend supports.
  Status supports(const Problem& problem, const Limits& limits = {}) const;
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
Status run(const Plan& plan, const ParamsRef& params, Workspace workspace, Queue queue = {});

/// The kernel that a call with these legal arguments runs on (null: none), and in *reasons, unless
/// null, why not on better ones ("sm90/dense: softmax_scale: got a negative one, supported: ...").
const Kernel* kernel_of(const Plan& plan, const ParamsRef& params, std::string* reasons = nullptr);

}  // namespace msa MSA_API
