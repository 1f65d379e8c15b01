#include "call.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string_view>

#include "errors.h"
#include "runtime.h"

namespace msa::python {
namespace {

constexpr Content kRows = Content::kRows, kF32 = Content::kF32, kI32 = Content::kI32;

// ---- arguments ----------------------------------------------------------------------------------

struct BatchSlot {
  const char* name;
  TensorView Batch::* view;
};
constexpr std::array<BatchSlot, 6> kBatch = {{{"cu_seqlens_q", &Batch::cu_seqlens_q},
                                              {"cu_seqlens_k", &Batch::cu_seqlens_k},
                                              {"seq_lens", &Batch::seq_lens},
                                              {"page_table", &Batch::page_table},
                                              {"q_offset", &Batch::q_offset},
                                              {"block_offset", &Batch::block_offset}}};

struct Options {
  bool causal = true;
  std::optional<int32_t> block_size, topk, init_blocks, local_blocks;
  float softmax_scale = 0;
  std::optional<int32_t> max_seqlen_q, max_seqlen_k;
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
    raise(PyExc_ValueError, name, ": got ", nb::repr(value).c_str(), ", expected at most 2^31 - 1");
  return static_cast<int32_t>(wide);
}

float scale(nb::handle value) {
  if (value.is_none()) return 0;  // the default, 1/sqrt(D)
  const double number = PyFloat_AsDouble(value.ptr());
  if (number == -1 && PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    raise(PyExc_TypeError, "softmax_scale: got ", nb::repr(value).c_str(),
          ", expected a number or None");
  }
  if (!std::isfinite(number) || static_cast<float>(number) == 0)
    raise(PyExc_ValueError, "softmax_scale: got ", nb::repr(value).c_str(),
          ", expected a finite number other than 0, or None for 1/sqrt(D)");
  return static_cast<float>(number);
}

Options parse(nb::tuple given) {
  Options o;
  if (!given[0].is_none()) {
    const int truth = PyObject_IsTrue(nb::object(given[0]).ptr());
    if (truth < 0) throw nb::python_error();
    o.causal = truth == 1;
  }
  o.block_size = integer("block_size", given[1]);
  o.topk = integer("topk", given[2]);
  o.init_blocks = integer("init_blocks", given[3]);
  o.local_blocks = integer("local_blocks", given[4]);
  o.softmax_scale = scale(given[5]);
  o.max_seqlen_q = integer("max_seqlen_q", given[6]);
  o.max_seqlen_k = integer("max_seqlen_k", given[7]);
  return o;
}

// ---- shapes -------------------------------------------------------------------------------------

/// "T,Hq,D" -> f("T"), f("Hq"), f("D")
template <class F>
void for_each_letter(std::string_view letters, const F& f) {
  while (!letters.empty()) {
    const size_t end = std::min(letters.find(','), letters.size());
    f(letters.substr(0, end));
    letters.remove_prefix(std::min(end + 1, letters.size()));
  }
}

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
    if (axis != view.rank) {
      std::string shape;
      for (int32_t i = 0; i < view.rank; ++i)
        shape += (i == 0 ? "" : ",") + std::to_string(view.shape[static_cast<size_t>(i)]);
      raise(PyExc_ValueError, name, ": got rank ", view.rank, " shape [", shape, "], expected [",
            letters, "]");
    }
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

int32_t narrow(const char* what, int64_t value) {
  if (value > INT32_MAX) raise(PyExc_ValueError, what, ": got ", value, ", expected below 2^31");
  return static_cast<int32_t>(value);
}

Problem problem_of(Op op, KvLayout layout, DType dtype, Device device, const Options& o,
                   const Extents& extents) {
  Problem p{.op = op, .dtype = dtype, .layout = layout, .device = device};
  p.heads_q = narrow("Hq", extents.get("Hq", p.heads_q));
  p.heads_kv = narrow("Hkv", extents.get("Hkv", extents.get("Hi", p.heads_kv)));
  p.head_dim = narrow("D", extents.get("D", p.head_dim));
  p.index_dim = narrow("Di", extents.get("Di", p.index_dim));
  p.topk = narrow("K", extents.get("K", p.topk));
  p.block_size = o.block_size.value_or(p.block_size);
  p.init_blocks = o.init_blocks.value_or(p.init_blocks);
  p.local_blocks = o.local_blocks.value_or(p.local_blocks);
  return p;
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
  const int64_t count = view.shape[0] - (prefix ? 1 : 0);
  for (int64_t b = 0; b < count; ++b) {
    const int64_t value = *view.at<const int32_t>(b + (prefix ? 1 : 0));
    const int64_t length =
        std::max<int64_t>(0, prefix ? value - *view.at<const int32_t>(b) : value);
    out.longest = std::max(out.longest, length);
    out.blocks += (length + block_size - 1) / block_size;
  }
  return out;
}

/// The bound of one kind of length: what the caller says, or what the metadata hold, but not more
/// than `most`, what the arrays can hold.
int64_t bound(const char* name, const char* source, std::optional<int32_t> given,
              const Lengths& found, bool host, int64_t most) {
  if (!given && !host)
    raise(PyExc_ValueError, name, ": not given, expected the longest length in ", source,
          ", since lengths in CUDA memory are not read back");
  if (given && *given < 0) raise(PyExc_ValueError, name, ": got ", *given, ", expected >= 0");
  if (given && host && found.longest > *given)
    raise(PyExc_ValueError, name, ": got ", *given, ", the longest length in ", source, " is ",
          found.longest);
  return std::min(given ? int64_t{*given} : found.longest, most);
}

/// Limits are rounded up to powers of two, so that growing contexts need few plans.
int64_t round_up(int64_t value) {
  return std::min<int64_t>(
      INT32_MAX,
      static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(std::max<int64_t>(1, value)))));
}

// ---- outputs ------------------------------------------------------------------------------------

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
nb::object empty_like(nb::handle like, nb::handle shape, const char* dtype) {
  static PyObject* empty = nullptr;  // guarded by the GIL
  if (empty == nullptr)
    empty = nb::object(nb::module_::import_("msa_cpp._arrays").attr("empty")).release().ptr();
  return nb::handle(empty)(like, shape, dtype);
}

nb::object new_output(nb::handle like, const char* name, std::string_view letters, DType dtype,
                      const Extents& extents) {
  nb::list shape;
  for_each_letter(letters, [&](std::string_view letter) {
    const std::optional<int64_t> extent = extents.find(letter);
    if (!extent)
      raise(PyExc_ValueError, name, ": not given, and its shape [", letters,
            "] depends on lengths in CUDA memory, which are not read back");
    shape.append(*extent);
  });
  return empty_like(like, nb::tuple(shape), numpy_name(dtype));
}

/// The library's message under the argument names of Python.
template <class Params>
Status renamed(const Status& status) {
  const std::string& message = status.message();
  const size_t end = message.find_first_of(":[");
  for (const Slot<Params>& slot : slots<Params>()) {
    if (end != std::string::npos && std::string_view(message).substr(0, end) == slot.core)
      return Status(status.code(), slot.name + message.substr(end));
  }
  return status;
}

}  // namespace

// ---- the table ----------------------------------------------------------------------------------

template <>
std::span<const Slot<IndexScoresParams>> slots() {
  using P = IndexScoresParams;
  static constexpr Slot<P> table[] = {
      {"q_idx", "q_idx", Role::kInput, kRows, "T,Hi,Di", "T,Hi,Di", &P::q_idx},
      {"k_idx", "k_idx", Role::kInput, kRows, "S,Di", "P,Bk,Di", &P::k_idx},
      {"out", "scores", Role::kOutput, kF32, "Hi,T,blocks", "Hi,T,blocks", &P::scores}};
  return table;
}

template <>
std::span<const Slot<SelectBlocksParams>> slots() {
  using P = SelectBlocksParams;
  static constexpr Slot<P> table[] = {
      {"scores", "scores", Role::kInput, kF32, "Hi,T,blocks", "Hi,T,blocks", &P::scores},
      {"num_valid_blocks", "num_valid_blocks", Role::kOptional, kI32, "T", "T",
       &P::num_valid_blocks},
      {"out", "ids", Role::kOutput, kI32, "Hi,T,K", "Hi,T,K", &P::ids}};
  return table;
}

template <>
std::span<const Slot<IndexSelectParams>> slots() {
  using P = IndexSelectParams;
  static constexpr Slot<P> table[] = {
      {"q_idx", "q_idx", Role::kInput, kRows, "T,Hi,Di", "T,Hi,Di", &P::q_idx},
      {"k_idx", "k_idx", Role::kInput, kRows, "S,Di", "P,Bk,Di", &P::k_idx},
      {"out", "ids", Role::kOutput, kI32, "Hi,T,K", "Hi,T,K", &P::ids},
      {"scores_out", "scores", Role::kExtra, kF32, "Hi,T,K", "Hi,T,K", &P::scores}};
  return table;
}

template <>
std::span<const Slot<SparseAttentionParams>> slots() {
  using P = SparseAttentionParams;
  static constexpr Slot<P> table[] = {
      {"q", "q", Role::kInput, kRows, "T,Hq,D", "T,Hq,D", &P::q},
      {"k", "k", Role::kInput, kRows, "S,Hkv,D", "P,Hkv,Bk,D", &P::k},
      {"v", "v", Role::kInput, kRows, "S,Hkv,D", "P,Hkv,Bk,D", &P::v},
      {"block_ids", "ids", Role::kInput, kI32, "Hkv,T,K", "Hkv,T,K", &P::ids},
      {"out", "o", Role::kOutput, Content::kOutput, "T,Hq,D", "T,Hq,D", &P::o},
      {"lse", "lse", Role::kExtra, kF32, "T,Hq", "T,Hq", &P::lse}};
  return table;
}

template <>
std::span<const Slot<DenseAttentionParams>> slots() {
  using P = DenseAttentionParams;
  static constexpr Slot<P> table[] = {
      {"q", "q", Role::kInput, kRows, "T,Hq,D", "T,Hq,D", &P::q},
      {"k", "k", Role::kInput, kRows, "S,Hkv,D", "P,Hkv,Bk,D", &P::k},
      {"v", "v", Role::kInput, kRows, "S,Hkv,D", "P,Hkv,Bk,D", &P::v},
      {"out", "o", Role::kOutput, Content::kOutput, "T,Hq,D", "T,Hq,D", &P::o},
      {"lse", "lse", Role::kExtra, kF32, "T,Hq", "T,Hq", &P::lse},
      {"block_max", "block_max", Role::kExtra, kF32, "Hq,T,blocks", "Hq,T,blocks", &P::block_max}};
  return table;
}

template <>
std::span<const Slot<MergeParams>> slots() {
  using P = MergeParams;
  static constexpr Slot<P> table[] = {
      {"o_parts", "o_parts", Role::kInput, kRows, "parts,T,Hq,D", "", &P::o_parts},
      {"lse_parts", "lse_parts", Role::kInput, kF32, "parts,T,Hq", "", &P::lse_parts},
      {"out", "o", Role::kOutput, Content::kOutput, "T,Hq,D", "", &P::o},
      {"lse", "lse", Role::kExtra, kF32, "T,Hq", "", &P::lse}};
  return table;
}

template <>
std::span<const Slot<BlockListsParams>> slots() {
  using P = BlockListsParams;
  static constexpr Slot<P> table[] = {
      {"block_ids", "ids", Role::kInput, kI32, "Hkv,T,K", "Hkv,T,K", &P::ids},
      {"row_ptr", "row_ptr", Role::kOutput, kI32, "Hkv,NB+1", "Hkv,NB+1", &P::row_ptr},
      {"entries", "entries", Role::kOutput, kI32, "Hkv,T*K", "Hkv,T*K", &P::entries}};
  return table;
}

template <>
std::span<const Slot<AppendPagedParams>> slots() {
  using P = AppendPagedParams;
  static constexpr Slot<P> table[] = {
      {"k", "k", Role::kOptional, kRows, "", "T,Hkv,D", &P::k},
      {"v", "v", Role::kOptional, kRows, "", "T,Hkv,D", &P::v},
      {"k_idx", "k_idx", Role::kOptional, kRows, "", "T,Di", &P::k_idx},
      {"k_pages", "k_pages", Role::kUpdated, kRows, "", "P,Hkv,Bk,D", &P::k_pages},
      {"v_pages", "v_pages", Role::kUpdated, kRows, "", "P,Hkv,Bk,D", &P::v_pages},
      {"k_idx_pages", "k_idx_pages", Role::kUpdated, kRows, "", "P,Bk,Di", &P::k_idx_pages}};
  return table;
}

template <>
std::span<const Slot<BlockMassParams>> slots() {
  using P = BlockMassParams;
  static constexpr Slot<P> table[] = {
      {"q", "q", Role::kInput, kRows, "T,Hq,D", "T,Hq,D", &P::q},
      {"k", "k", Role::kInput, kRows, "S,Hkv,D", "P,Hkv,Bk,D", &P::k},
      {"lse", "lse", Role::kInput, kF32, "T,Hq", "T,Hq", &P::lse},
      {"out", "mass", Role::kOutput, kF32, "Hkv,T,blocks", "Hkv,T,blocks", &P::mass}};
  return table;
}

// ---- the call -----------------------------------------------------------------------------------

template <class Params>
nb::tuple call(Op op, nb::tuple tensors, nb::object batch, nb::tuple options, nb::object plan,
               nb::object workspace, const std::string& backend) {
  constexpr bool has_batch = requires(Params p) { p.batch; };
  const std::span<const Slot<Params>> table = slots<Params>();
  const Options opt = parse(options);
  Params params;
  Leases leases;

  // Metadata first: it says whether keys are packed or paged.
  bool paged = op == Op::kAppendPaged;
  if constexpr (has_batch) {
    nb::tuple given = nb::cast<nb::tuple>(batch);
    for (size_t i = 0; i < kBatch.size(); ++i) {
      const nb::handle array = given[i];
      if (!array.is_none())
        params.batch.*kBatch[i].view = view_of(array, kBatch[i].name, kI32, false, &leases);
    }
    params.batch.causal = opt.causal;
    paged = paged || params.batch.seq_lens.given() || params.batch.page_table.given();
  }

  // Arrays, and what their shapes say.
  Extents extents;
  const TensorView* rows = nullptr;  // the first array of the problem's dtype
  if (opt.topk) extents.bind("K", *opt.topk);
  if (opt.block_size) extents.bind("Bk", *opt.block_size);
  nb::object first;
  std::array<nb::object, 8> arrays;
  for (size_t i = 0; i < table.size(); ++i) {
    const Slot<Params>& slot = table[i];
    arrays[i] = tensors[i];
    if (arrays[i].is(nb::handle(Py_False))) arrays[i] = nb::none();
    if (arrays[i].is_none() && slot.role == Role::kInput)
      raise(PyExc_TypeError, slot.name, ": got None, expected an array of shape [",
            paged ? slot.paged : slot.packed, "]");
    if (arrays[i].is_none() || arrays[i].is(nb::handle(Py_True))) continue;
    const bool written = slot.role != Role::kInput && slot.role != Role::kOptional;
    TensorView& view = params.*slot.view;
    view = view_of(arrays[i], slot.name, slot.content, written, &leases);
    extents.bind(slot.name, view, paged ? slot.paged : slot.packed);
    if (!first.is_valid()) first = arrays[i];
    if (slot.content != kRows) continue;
    if (rows == nullptr) rows = &view;
    if (view.dtype != rows->dtype)
      raise(PyExc_TypeError, slot.name, ": got dtype ", numpy_name(view.dtype), ", expected ",
            numpy_name(rows->dtype), " like the other arrays");
  }
  if (!first.is_valid()) raise(PyExc_TypeError, table[0].name, ": got None, expected an array");

  const Device device = (params.*table[0].view).given() ? (params.*table[0].view).device
                        : rows != nullptr               ? rows->device
                                                        : Device{};
  const bool host = device.kind == DeviceKind::kCPU;
  const KvLayout layout = paged ? KvLayout::kPaged : KvLayout::kPacked;
  const Problem problem =
      problem_of(op, layout, rows != nullptr ? rows->dtype : DType::kF32, device, opt, extents);

  // How much there is.
  const int64_t tokens = extents.get("T", 0);
  const int64_t block_size = std::max(1, problem.block_size);
  Limits limits{.max_tokens = round_up(tokens)};
  if constexpr (has_batch) {
    const Batch& b = params.batch;
    const Lengths q = lengths_of(b.cu_seqlens_q, true, block_size);
    const Lengths k = paged ? lengths_of(b.seq_lens, false, block_size)
                            : lengths_of(b.cu_seqlens_k, true, block_size);
    const int64_t most =
        paged ? (b.page_table.rank == 2 ? b.page_table.shape[1] * block_size : INT32_MAX)
              : extents.get("S", INT32_MAX);
    const char* source = paged ? "seq_lens" : "cu_seqlens_k";
    const char* q_name = op == Op::kSparseDecode ? "max_q_len" : "max_seqlen_q";
    limits.max_batch = round_up(b.cu_seqlens_q.shape[0] - 1);
    limits.max_q_len = round_up(bound(q_name, "cu_seqlens_q", opt.max_seqlen_q, q, host, tokens));
    limits.max_kv_len = round_up(bound("max_seqlen_k", source, opt.max_seqlen_k, k, host, most));
    const int64_t longest = opt.max_seqlen_k ? *opt.max_seqlen_k : std::min(k.longest, most);
    extents.bind("blocks", (longest + block_size - 1) / block_size);
    if (host) extents.bind("NB+1", k.blocks + 1);
    extents.bind("T*K", tokens * problem.topk);
    if constexpr (requires { params.softmax_scale; }) params.softmax_scale = opt.softmax_scale;
  } else {
    limits.max_kv_len = round_up(extents.get("blocks", 1) * block_size);
  }

  Plan chosen;
  if (plan.is_none()) {
    raise_unless_ok(num_threads(&limits.max_threads));
    raise_unless_ok(cached_plan(problem, limits, backend, &chosen));
  } else {
    if (!nb::try_cast(plan, chosen))
      raise(PyExc_TypeError, "plan: got ", nb::repr(plan.type()).c_str(),
            ", expected a msa_cpp.Plan");
    check_options(chosen.problem, opt);
  }

  // Outputs that were not given.
  nb::list outputs;
  for (size_t i = 0; i < table.size(); ++i) {
    const Slot<Params>& slot = table[i];
    if (slot.role != Role::kOutput && slot.role != Role::kExtra) continue;
    const bool wanted =
        arrays[i].is_none() ? slot.role == Role::kOutput : arrays[i].is(nb::handle(Py_True));
    if (wanted) {
      const DType dtype = slot.content == kI32   ? DType::kI32
                          : slot.content == kF32 ? DType::kF32
                                                 : problem.dtype;
      arrays[i] = new_output(first, slot.name, slot.packed, dtype, extents);
      params.*slot.view = view_of(arrays[i], slot.name, slot.content, true, &leases);
    }
    outputs.append(arrays[i]);
  }

  // Scratch memory and threads, or the stream.
  Workspace scratch;
  Queue queue;
  LanePtr lane;
  if (host) {
    lane = take_lane(chosen.limits.max_threads);
    queue.threads = &lane->team;
  } else {
    queue.cuda_stream = current_stream(first, device);
  }
  if (workspace.is_none() && host) {
    scratch.bytes = static_cast<size_t>(chosen.workspace_bytes);
    scratch.data = lane->memory(scratch.bytes);
  } else {
    if (workspace.is_none())
      workspace = empty_like(first, nb::make_tuple(chosen.workspace_bytes), "uint8");
    const Bytes bytes = bytes_of(workspace, "workspace", &leases);
    scratch = {bytes.data, bytes.count};
  }

  Status status;
  {
    const nb::gil_scoped_release no_gil;
    status = run(chosen, params, scratch, queue);
    lane.reset();
  }
  raise_unless_ok(renamed<Params>(status));
  return nb::tuple(outputs);
}

template nb::tuple call<IndexScoresParams>(Op, nb::tuple, nb::object, nb::tuple, nb::object,
                                           nb::object, const std::string&);
template nb::tuple call<SelectBlocksParams>(Op, nb::tuple, nb::object, nb::tuple, nb::object,
                                            nb::object, const std::string&);
template nb::tuple call<IndexSelectParams>(Op, nb::tuple, nb::object, nb::tuple, nb::object,
                                           nb::object, const std::string&);
template nb::tuple call<SparseAttentionParams>(Op, nb::tuple, nb::object, nb::tuple, nb::object,
                                               nb::object, const std::string&);
template nb::tuple call<DenseAttentionParams>(Op, nb::tuple, nb::object, nb::tuple, nb::object,
                                              nb::object, const std::string&);
template nb::tuple call<MergeParams>(Op, nb::tuple, nb::object, nb::tuple, nb::object, nb::object,
                                     const std::string&);
template nb::tuple call<BlockListsParams>(Op, nb::tuple, nb::object, nb::tuple, nb::object,
                                          nb::object, const std::string&);
template nb::tuple call<AppendPagedParams>(Op, nb::tuple, nb::object, nb::tuple, nb::object,
                                           nb::object, const std::string&);
template nb::tuple call<BlockMassParams>(Op, nb::tuple, nb::object, nb::tuple, nb::object,
                                         nb::object, const std::string&);

}  // namespace msa::python
