#include "call.h"

#include <nanobind/stl/string.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "errors.h"
#include "runtime.h"
#include "tensors.h"

namespace msa::python {
namespace {

// ---- options ------------------------------------------------------------------------------------

struct Options {
  bool causal = true;
  std::optional<int32_t> block_size, topk, init_blocks, local_blocks;
  float softmax_scale = 0;
  std::optional<int32_t> max_seqlen_q, max_seqlen_k, num_blocks;
};

std::optional<int32_t> integer(const char* name, nb::handle value) {
  if (value.is_none()) return {};
  const nb::object index = nb::steal(PyNumber_Index(value.ptr()));
  if (!index.is_valid()) {
    PyErr_Clear();
    raise(PyExc_TypeError, name, ": got ", nb::repr(value).c_str(), ", expected an integer");
  }
  int overflow = 0;
  const int64_t wide = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  if (overflow != 0 || wide < INT32_MIN || wide > INT32_MAX)
    raise(PyExc_ValueError, name, ": got ", nb::repr(value).c_str(), ", expected below 2^31");
  return static_cast<int32_t>(wide);
}

bool truth(const char* name, nb::handle value) {
  const int result = PyObject_IsTrue(value.ptr());
  if (result >= 0) return result == 1;
  PyErr_Clear();
  raise(PyExc_TypeError, name, ": got ", nb::type_name(value.type()).c_str(), ", expected a bool");
}

float scale(nb::handle value) {
  if (value.is_none()) return 0;  // the default, 1/sqrt(D)
  const double number = PyFloat_AsDouble(value.ptr());
  if (number == -1 && PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    raise(PyExc_TypeError, "softmax_scale: got ", nb::repr(value).c_str(),
          ", expected a number or None");
  }
  if (!std::isfinite(static_cast<float>(number)) || static_cast<float>(number) == 0)
    raise(PyExc_ValueError, "softmax_scale: got ", nb::repr(value).c_str(),
          ", expected a finite number other than 0, or None for 1/sqrt(D)");
  return static_cast<float>(number);
}

Options parse(const nb::tuple& given) {
  const auto at = [&](size_t i) -> nb::object {
    return i < given.size() ? nb::object(given[i]) : nb::none();
  };
  Options o;
  if (const nb::object causal = at(0); !causal.is_none()) o.causal = truth("causal", causal);
  o.block_size = integer("block_size", at(1));
  o.max_seqlen_q = integer("max_seqlen_q", at(2));
  o.max_seqlen_k = integer("max_seqlen_k", at(3));
  o.softmax_scale = scale(at(4));
  o.topk = integer("topk", at(5));
  o.init_blocks = integer("init_blocks", at(6));
  o.local_blocks = integer("local_blocks", at(7));
  o.num_blocks = integer("num_blocks", at(8));
  return o;
}

/// The options of a call with an explicit plan must be the plan's; shapes are checked by msa::run.
void check_options(const Problem& plan, const Options& o) {
  const auto same = [](const char* name, std::optional<int32_t> given, int32_t planned) {
    if (given && *given != planned)
      raise(PyExc_ValueError, name, ": got ", *given, ", the plan was made for ", planned);
  };
  same("block_size", o.block_size, plan.block_size);
  same("topk", o.topk, plan.topk);
  same("init_blocks", o.init_blocks, plan.init_blocks);
  same("local_blocks", o.local_blocks, plan.local_blocks);
}

// ---- shapes -------------------------------------------------------------------------------------

/// What the letters of problem.h mean in this call: what the first array with a letter says. That
/// the others agree is checked by msa::run.
class Extents {
 public:
  void bind(std::string_view letter, int64_t extent) {
    if (!find(letter) && count_ < known_.size()) known_[count_++] = {letter, extent};
  }
  void bind(const char* name, const TensorView& view, std::string_view letters) {
    int32_t axis = 0;
    for_each_letter(letters, [&](std::string_view letter) {
      if (axis < view.rank) bind(letter, view.shape[static_cast<size_t>(axis)]);
      ++axis;
    });
    if (axis == view.rank) return;
    std::string shape;
    for (int32_t i = 0; i < view.rank; ++i)
      shape += (i == 0 ? "" : ",") + std::to_string(view.shape[static_cast<size_t>(i)]);
    raise(PyExc_ValueError, name, ": got rank ", view.rank, " shape [", shape, "], expected [",
          letters, "]");
  }
  std::optional<int64_t> find(std::string_view letter) const {
    for (size_t i = 0; i < count_; ++i)
      if (known_[i].letter == letter) return known_[i].extent;
    return {};
  }
  int64_t get(std::string_view letter, int64_t otherwise) const {
    return find(letter).value_or(otherwise);
  }

 private:
  struct Known {
    std::string_view letter;
    int64_t extent;
  };
  std::array<Known, 20> known_;
  size_t count_ = 0;
};

int32_t narrow(const char* letter, int64_t extent) {
  if (extent > INT32_MAX)
    raise(PyExc_ValueError, letter, ": got ", extent, ", expected below 2^31");
  return static_cast<int32_t>(extent);
}

const char* numpy_name(DType dtype) {
  switch (dtype) {
    case DType::kBF16:
      return "bfloat16";
    case DType::kF16:
      return "float16";
    case DType::kI32:
      return "int32";
    default:
      return "float32";
  }
}

/// An uninitialised array of the kind and on the device of `like`: msa_cpp._arrays.empty.
nb::object empty_like(nb::handle like, const nb::tuple& shape, const char* dtype) {
  static PyObject* empty = nullptr;  // guarded by the GIL
  if (empty == nullptr)
    empty = nb::object(nb::module_::import_("msa_cpp._arrays").attr("empty")).release().ptr();
  return nb::handle(empty)(like, shape, dtype);
}

// ---- lengths ------------------------------------------------------------------------------------

/// What the lengths of a batch amount to.
struct Lengths {
  int64_t longest = 0;
  int64_t blocks = 0;  // sum over sequences of ceil(length / Bk)
};

/// `prefix`: view holds B+1 prefix sums, else B lengths. Malformed metadata counts as empty here:
/// msa::run refuses it by name.
Lengths lengths_of(const TensorView& view, bool prefix, int64_t block_size) {
  Lengths out;
  if (view.rank != 1 || view.device.kind != DeviceKind::kCPU) return out;
  for (int64_t i = prefix ? 1 : 0; i < view.shape[0]; ++i) {
    int64_t length = *view.at<const int32_t>(i);
    if (prefix) length -= *view.at<const int32_t>(i - 1);
    length = std::max<int64_t>(0, length);
    out.longest = std::max(out.longest, length);
    out.blocks += (length + block_size - 1) / block_size;
  }
  return out;
}

/// The bound of one kind of length: what the caller says, or what the metadata hold, but not more
/// than `most`, what the arrays can hold.
int64_t bound(const char* name, const char* source, std::optional<int32_t> given, int64_t longest,
              bool host, int64_t most) {
  if (!given && !host)
    raise(PyExc_ValueError, name, ": not given, expected the longest length in ", source,
          ", since lengths in CUDA memory are not read back");
  if (given && *given < 0) raise(PyExc_ValueError, name, ": got ", *given, ", expected >= 0");
  if (given && longest > *given)
    raise(PyExc_ValueError, name, ": got ", *given, ", the longest length in ", source, " is ",
          longest);
  return std::min(given ? int64_t{*given} : longest, most);
}

/// Limits are rounded up to powers of two, so that growing contexts need few plans.
int64_t round_up(int64_t value) {
  const auto least = static_cast<uint64_t>(std::max<int64_t>(1, value));
  return std::min<int64_t>(INT32_MAX, static_cast<int64_t>(std::bit_ceil(least)));
}

// ---- calls --------------------------------------------------------------------------------------

class Call {
 public:
  Call(const OpInfo& info, const nb::tuple& tensors, nb::handle batch, const nb::tuple& options,
       nb::handle plan, nb::handle backend)
      : info_(info), options_(parse(options)), paged_((info.uses & kPagedOnly) != 0) {
    std::memcpy(params_, info.defaults, info.size);
    if (options_.topk) extents_.bind("K", *options_.topk);
    if (info.has_batch()) read_batch(nb::cast<nb::tuple>(batch));
    if (info.softmax_scale != OpInfo::kNone)
      std::memcpy(params_ + info.softmax_scale, &options_.softmax_scale, sizeof(float));
    read_arrays(tensors);
    problem_ = problem();
    limits_ = limits(plan.is_none());
    choose_plan(plan, backend);
  }

  /// The outputs in the order of the slots, None for those not asked for. `workspace`: an array, or
  /// None for memory of ours.
  nb::tuple run(nb::object workspace) {
    const nb::tuple outputs = make_outputs();
    Workspace scratch;
    Queue queue;
    LanePtr lane;
    if (host()) {
      lane = take_lane(plan_.limits.max_threads);
      queue.threads = &lane->team;
    } else {
      queue.cuda_stream = current_stream(first_, problem_.device);
    }
    if (workspace.is_none() && host()) {
      scratch.bytes = static_cast<size_t>(plan_.workspace_bytes);
      scratch.data = lane->memory(scratch.bytes);
    } else {
      if (workspace.is_none())
        workspace = empty_like(first_, nb::make_tuple(plan_.workspace_bytes), "uint8");
      scratch = workspace_of(workspace, &leases_);
    }
    Status status;
    {
      const nb::gil_scoped_release no_gil;
      status = msa::run(plan_, {info_.params, params_}, scratch, queue);
      lane.reset();
    }
    raise_unless_ok(renamed(status));
    return outputs;
  }

 private:
  bool host() const { return problem_.device.kind == DeviceKind::kCPU; }

  /// Comes first, since it says whether the keys are packed or paged.
  void read_batch(const nb::tuple& given) {
    Batch& b = info_.batch_in(params_);
    const std::pair<const char*, TensorView*> views[] = {
        {"cu_seqlens_q", &b.cu_seqlens_q}, {"cu_seqlens_k", &b.cu_seqlens_k},
        {"seq_lens", &b.seq_lens},         {"page_table", &b.page_table},
        {"q_offset", &b.q_offset},         {"block_offset", &b.block_offset},
        {"page_rows", &b.page_rows}};
    for (size_t i = 0; i < std::min(std::size(views), given.size()); ++i) {
      const nb::object array = given[i];
      if (!array.is_none())
        *views[i].second = view_of(array, views[i].first, Content::kI32, false, &leases_);
    }
    b.causal = options_.causal;
    paged_ = paged_ || b.seq_lens.given() || b.page_table.given();
  }

  void read_arrays(const nb::tuple& given) {
    size_t i = 0;
    for (const Argument& a : info_.arguments) {
      if (!a.is_tensor()) continue;
      nb::object& array = arrays_[i] = given[i];
      ++i;
      if (array.is_none() && a.role == Role::kInput)
        raise(PyExc_TypeError, name_in_python(info_, a), ": got None, expected an array [",
              a.letters(paged_), "]");
      if (array.is_none() || (PyBool_Check(array.ptr()) && a.role != Role::kInput)) continue;
      const char* name = name_in_python(info_, a);
      TensorView& view = a.in(params_);
      view = view_of(array, name, a.content, a.is_written(), &leases_);
      extents_.bind(name, view, a.letters(paged_));
      if (!first_.is_valid()) first_ = array, problem_.device = view.device;
      if (a.content == Content::kRows || (a.content == Content::kWide && !dtype_))
        same_dtype(name, view.dtype);
    }
    if (!first_.is_valid())
      raise(PyExc_TypeError, name_in_python(info_, info_.arguments[0]),
            ": got None, expected an array");
  }

  void same_dtype(const char* name, DType dtype) {
    if (!dtype_) dtype_ = dtype;
    if (dtype != *dtype_)
      raise(PyExc_TypeError, name, ": got dtype ", numpy_name(dtype), ", expected ",
            numpy_name(*dtype_), " like the other arrays");
  }

  Problem problem() const {
    Problem p = problem_;  // the device is known
    p.op = info_.op;
    p.dtype = dtype_.value_or(p.dtype);
    p.layout = paged_ ? KvLayout::kPaged : KvLayout::kPacked;
    p.heads_q = narrow("Hq", extents_.get("Hq", p.heads_q));
    p.heads_kv = narrow("Hkv", extents_.get("Hkv", extents_.get("Hi", p.heads_kv)));
    p.head_dim = narrow("D", extents_.get("D", p.head_dim));
    p.index_dim = narrow("Di", extents_.get("Di", p.index_dim));
    p.topk = narrow("K", extents_.get("K", p.topk));
    p.block_size = options_.block_size.value_or(p.block_size);
    p.init_blocks = options_.init_blocks.value_or(p.init_blocks);
    p.local_blocks = options_.local_blocks.value_or(p.local_blocks);
    return p;
  }

  /// The bounds of this call, and the letters that depend on them. `needed`: no plan was given.
  Limits limits(bool needed) {
    const int64_t tokens = extents_.get("T", 0);
    const int64_t block_size = std::max(1, problem_.block_size);
    Limits out{.max_tokens = round_up(tokens)};
    if (info_.has_batch()) {
      const Batch& b = info_.batch_in(params_);
      const Lengths q = lengths_of(b.cu_seqlens_q, true, block_size);
      const Lengths k = paged_ ? lengths_of(b.seq_lens, false, block_size)
                               : lengths_of(b.cu_seqlens_k, true, block_size);
      const bool known = host() || !needed;
      const int64_t rank = b.page_table.rank;
      const int64_t most_k = !paged_ ? extents_.get("S", INT32_MAX)
                             : rank == 1 || rank == 2
                                 ? b.page_table.shape[static_cast<size_t>(rank - 1)] * block_size
                                 : INT32_MAX;
      out.max_batch = round_up(b.cu_seqlens_q.shape[0] - 1);
      out.max_seqlen_q = round_up(
          bound("max_seqlen_q", "cu_seqlens_q", options_.max_seqlen_q, q.longest, known, tokens));
      const int64_t longest = bound("max_seqlen_k", paged_ ? "seq_lens" : "cu_seqlens_k",
                                    options_.max_seqlen_k, k.longest, known, most_k);
      out.max_seqlen_k = round_up(longest);
      if (host() || options_.max_seqlen_k)
        extents_.bind("blocks",
                      (options_.max_seqlen_k.value_or(longest) + block_size - 1) / block_size);
      if (options_.num_blocks || host())
        extents_.bind("NB+1", options_.num_blocks.value_or(k.blocks) + 1);
      extents_.bind("T*K", tokens * problem_.topk);
    } else {
      out.max_seqlen_k = round_up(extents_.get("blocks", 1) * block_size);
    }
    return out;
  }

  void choose_plan(nb::handle plan, nb::handle backend) {
    if (!plan.is_none()) {
      if (!nb::try_cast(plan, plan_))
        raise(PyExc_TypeError, "plan: got ", nb::type_name(plan.type()).c_str(),
              ", expected a msa_cpp.Plan");
      if (plan_.problem.op == info_.op)
        check_options(plan_.problem, options_);  // else refused by run
      return;
    }
    if (!nb::isinstance<nb::str>(backend))
      raise(PyExc_TypeError, "backend: got ", nb::type_name(backend.type()).c_str(),
            ", expected a name of msa_cpp.backends()");
    raise_unless_ok(num_threads(&limits_.max_threads));
    raise_unless_ok(cached_plan(problem_, limits_, nb::cast<std::string>(backend), &plan_));
  }

  /// Makes what was not given and is wanted: outputs in any case, extras for True.
  nb::tuple make_outputs() {
    nb::list outputs;
    size_t i = 0;
    for (const Argument& a : info_.arguments) {
      if (!a.is_tensor()) continue;
      nb::object& array = arrays_[i++];
      if (a.role != Role::kOutput && a.role != Role::kExtra) continue;
      if (array.is(nb::handle(Py_True)) || (a.role == Role::kOutput && array.is_none())) {
        array = new_output(a);
        a.in(params_) =
            view_of(array, name_in_python(info_, a), a.content, /*written=*/true, &leases_);
      }
      outputs.append(array.is(nb::handle(Py_False)) ? nb::none() : array);
    }
    return nb::tuple(outputs);
  }

  nb::object new_output(const Argument& a) const {
    nb::list shape;
    for_each_letter(a.letters(paged_), [&](std::string_view letter) {
      const std::optional<int64_t> extent = extents_.find(letter);
      if (!extent)
        raise(PyExc_ValueError, name_in_python(info_, a), ": not given, and its shape [",
              a.letters(paged_), "] depends on lengths in CUDA memory, which are not read back");
      shape.append(*extent);
    });
    const bool i32 = a.content == Content::kI32 || a.content == Content::kBlocks;
    const DType dtype = i32                          ? DType::kI32
                        : a.content == Content::kF32 ? DType::kF32
                                                     : problem_.dtype;
    return empty_like(first_, nb::tuple(shape), numpy_name(dtype));
  }

  /// The library's message under the argument names of Python.
  Status renamed(const Status& status) const {
    const std::string& message = status.message();
    const size_t end = std::min(message.find_first_of(":["), message.size());
    const Argument* a = info_.find(std::string_view(message).substr(0, end));
    if (a == nullptr) return status;
    return Status(status.code(), name_in_python(info_, *a) + message.substr(end));
  }

  const OpInfo& info_;
  const Options options_;
  bool paged_;
  ParamsStorage storage_;
  std::byte* const params_ = storage_.memory;  ///< the struct of arguments
  Extents extents_;
  Leases leases_;
  std::array<nb::object, 16> arrays_;  ///< in the order of the table, without the batch
  nb::object first_;                   // the first one given: the kind and the device of outputs
  std::optional<DType> dtype_;         // of the rows
  Problem problem_;
  Limits limits_;
  Plan plan_;
};

}  // namespace

const char* name_in_python(const OpInfo& info, const Argument& argument) {
  if (argument.python != nullptr) return argument.python;
  if (argument.role != Role::kOutput) return argument.name;
  const auto outputs = std::count_if(info.arguments.begin(), info.arguments.end(),
                                     [](const Argument& a) { return a.role == Role::kOutput; });
  return outputs == 1 ? "out" : argument.name;
}

nb::tuple call(const OpInfo& info, const nb::tuple& tensors, nb::handle batch,
               const nb::tuple& options, nb::handle plan, nb::object workspace,
               nb::handle backend) {
  return Call(info, tensors, batch, options, plan, backend).run(std::move(workspace));
}

}  // namespace msa::python
