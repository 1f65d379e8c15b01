// msa_cpp._core: the operators, plans, backends and threads. The public Python API is msa_cpp.ops.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "call.h"
#include "errors.h"
#include "msa/msa.h"
#include "runtime.h"

namespace msa::python {
namespace {

void add_op(nb::module_& module, const OpInfo& info) {
  module.def(
      info.name,
      [&info](const nb::tuple& tensors, nb::handle batch, const nb::tuple& options, nb::handle plan,
              nb::object workspace, nb::handle backend) {
        return call(info, tensors, batch, options, plan, std::move(workspace), backend);
      },
      nb::arg("tensors"), nb::arg("batch").none(), nb::arg("options"), nb::arg("plan").none(),
      nb::arg("workspace").none(), nb::arg("backend").none());
}

/// The table of operators, for what Python makes of it: the rows of `msa_cpp._call.Operator`.
nb::list operators() {
  constexpr const char* kRoles[] = {"input",   "optional", "output", "extra",
                                    "updated", "absent",   "batch"};
  constexpr const char* kContents[] = {"rows", "wide", "f32", "i32", "blocks"};
  nb::list out;
  for (const OpInfo& info : all_ops()) {
    nb::list arguments;
    for (const Argument& a : info.arguments) {
      if (!a.is_tensor()) continue;
      arguments.append(nb::make_tuple(name_in_python(info, a), kRoles[static_cast<size_t>(a.role)],
                                      kContents[static_cast<size_t>(a.content)],
                                      nb::str(a.shape.data(), a.shape.size())));
    }
    const char* keys = (info.uses & kPackedOnly) != 0  ? "packed"
                       : (info.uses & kPagedOnly) != 0 ? "paged"
                                                       : "any";
    out.append(nb::make_tuple(info.name, nb::tuple(arguments), info.has_batch(), keys,
                              info.softmax_scale != OpInfo::kNone, (info.uses & kForced) != 0));
  }
  return out;
}

Op op_named(const std::string& name) {
  if (const OpInfo* info = find_op(name)) return info->op;
  std::string known;
  for (const OpInfo& info : all_ops())
    known += (known.empty() ? "" : ", ") + std::string(info.name);
  raise(PyExc_ValueError, "op: got \"", name, "\", expected one of ", known);
}

DType dtype_named(const std::string& name) {
  if (name == "float32") return DType::kF32;
  if (name == "bfloat16") return DType::kBF16;
  if (name == "float16") return DType::kF16;
  raise(PyExc_ValueError, "dtype: got \"", name, "\", expected float32, bfloat16 or float16");
}

Plan make_plan(const std::string& op, const std::string& dtype, bool paged, int32_t heads_q,
               int32_t heads_kv, int32_t head_dim, int32_t index_dim, int32_t block_size,
               int32_t topk, int32_t init_blocks, int32_t local_blocks, int32_t cuda_device,
               int64_t max_batch, int64_t max_tokens, int64_t max_seqlen_q, int64_t max_seqlen_k,
               const std::string& backend) {
  const Problem problem{
      .op = op_named(op),
      .dtype = dtype_named(dtype),
      .layout = paged ? KvLayout::kPaged : KvLayout::kPacked,
      .heads_q = heads_q,
      .heads_kv = heads_kv,
      .head_dim = head_dim,
      .index_dim = index_dim,
      .block_size = block_size,
      .topk = topk,
      .init_blocks = init_blocks,
      .local_blocks = local_blocks,
      .device = cuda_device < 0 ? Device{} : Device{DeviceKind::kCUDA, cuda_device}};
  Limits limits{.max_batch = max_batch,
                .max_tokens = max_tokens,
                .max_seqlen_q = max_seqlen_q,
                .max_seqlen_k = max_seqlen_k};
  raise_unless_ok(num_threads(&limits.max_threads));
  Plan out;
  raise_unless_ok(msa::plan(problem, limits, &out, backend));
  return out;
}

nb::list list_backends() {
  nb::list out;
  for (const Backend* backend : backends()) {
    const Status usable = backend->usable();
    out.append(nb::make_tuple(backend->name, usable.ok(), usable.message(), backend->requirement,
                              backend->priority));
  }
  return out;
}

}  // namespace

NB_MODULE(_core, module) {
  nb::set_leak_warnings(false);  // threads of the program may hold plans when it ends
  module.attr("__version__") = MSA_VERSION_STRING;

  nb::class_<Plan>(module, "Plan", "An operator bound to a backend, made by msa_cpp.plan().")
      .def_prop_ro("op", [](const Plan& p) { return name_of(p.problem.op); })
      .def_prop_ro("backend", [](const Plan& p) { return p.backend->name; })
      .def_prop_ro("kernel", [](const Plan& p) { return p.kernel(); })
      .def_ro("workspace_bytes", &Plan::workspace_bytes)
      .def_prop_ro("num_threads", [](const Plan& p) { return p.limits.max_threads; })
      .def("__repr__", [](const Plan& p) {
        return text("<msa_cpp.Plan ", name_of(p.problem.op), " on ", p.backend->name, ", ",
                    p.workspace_bytes, " bytes of workspace>");
      });
  module.def("plan", make_plan, nb::kw_only(), nb::arg("op"), nb::arg("dtype"), nb::arg("paged"),
             nb::arg("heads_q"), nb::arg("heads_kv"), nb::arg("head_dim"), nb::arg("index_dim"),
             nb::arg("block_size"), nb::arg("topk"), nb::arg("init_blocks"),
             nb::arg("local_blocks"), nb::arg("cuda_device"), nb::arg("max_batch"),
             nb::arg("max_tokens"), nb::arg("max_seqlen_q"), nb::arg("max_seqlen_k"),
             nb::arg("backend"));
  module.def("backends", list_backends);
  module.def("operators", operators);
  module.def("num_threads", [] {
    int32_t count = 0;
    raise_unless_ok(num_threads(&count));
    return count;
  });
  module.def("set_num_threads", [](int32_t count) {
    if (count < 1) raise(PyExc_ValueError, "num_threads: got ", count, ", expected >= 1");
    set_num_threads(count);
  });

  for (const OpInfo& info : all_ops()) add_op(module, info);
}

}  // namespace msa::python
