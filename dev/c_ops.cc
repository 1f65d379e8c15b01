// Prints include/msa/c_ops.h, the C structs of arguments, from the table of operators:
//   build/release/msa_c_ops > include/msa/c_ops.h
#include <cctype>
#include <cstdio>
#include <string>

#include "core/op_table.h"

namespace {

using namespace msa;  // NOLINT(google-build-using-namespace)

/// MSA_OP_KL_LOSS
std::string code_of(std::string name) {
  if (name.starts_with("msa_")) name.erase(0, 4);
  for (char& c : name) c = static_cast<char>(std::toupper(c));
  return "MSA_OP_" + name;
}

/// "out f32 [Hi,T,K], optional"
std::string text_of(const Argument& a) {
  if (!a.is_tensor()) return "";
  std::string text = a.is_written() ? "out " : "";
  if (a.content == Content::kF32) text += "f32 ";
  if (a.content == Content::kI32 || a.content == Content::kBlocks) text += "i32 ";
  text += "[" + std::string(a.letters(false)) + "]";
  if (a.letters(true) != a.letters(false)) text += " or [" + std::string(a.letters(true)) + "]";
  if (a.role != Role::kInput && a.role != Role::kOutput) text += ", optional";
  return text;
}

}  // namespace

int main() {
  std::printf(
      "/* The operators in C: codes, arguments, calls. Printed by dev/c_ops.cc from\n"
      " * src/core/op_table.cc; ops.h says what each one computes. Included by c_api.h.\n"
      " */\n/* clang-format off */\n#pragma once\n\ntypedef enum msa_op {\n");
  for (const OpInfo& op : all_ops())
    std::printf("  %s = %d,\n", code_of(op.name).c_str(), static_cast<int>(op.op));
  for (const OldName& old : old_names())
    std::printf("  %s MSA_DEPRECATED(\"%s\") = %d%s\n", code_of(old.name).c_str(),
                code_of(name_of(old.op)).c_str(), old.code, &old == &old_names().back() ? "" : ",");
  std::printf("} msa_op;\n\ntypedef enum msa_dtype {\n");
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16, DType::kI32}) {
    std::string name = name_of(dtype);
    for (char& c : name) c = static_cast<char>(std::toupper(c));
    std::printf("  MSA_%s = %d%s\n", name.c_str(), static_cast<int>(dtype),
                dtype == DType::kI32 ? " /* metadata: ids, lengths, page tables */" : ",");
  }
  std::printf("} msa_dtype;\n");
  const Problem p;
  std::printf(
      "\n/* Sparse attention of MiniMax-M3 in f32 over packed keys on the CPU. */\n"
      "#define MSA_PROBLEM_INIT \\\n"
      "  {.struct_size = sizeof(msa_problem), .op = %d, .dtype = %d, .layout = %d, .heads_q = %d, "
      "\\\n   .heads_kv = %d, .head_dim = %d, .index_dim = %d, .block_size = %d, .topk = %d, \\\n"
      "   .init_blocks = %d, .local_blocks = %d, .device_kind = %d, .device_id = %d}\n",
      static_cast<int>(p.op), static_cast<int>(p.dtype), static_cast<int>(p.layout), p.heads_q,
      p.heads_kv, p.head_dim, p.index_dim, p.block_size, p.topk, p.init_blocks, p.local_blocks,
      static_cast<int>(p.device.kind), p.device.id);
  std::string list;
  for (const OpInfo& op : all_ops()) {
    if (op.params != op.op) continue;
    const std::string name = op.c_params;
    list += " \\\n  X(" + name + ", " + code_of(op.name) + ")";
    std::printf("\n/* %s */\ntypedef struct msa_%s_params {\n  uint32_t struct_size;\n", op.summary,
                name.c_str());
    std::printf(op.softmax_scale != OpInfo::kNone ? "  float softmax_scale; /* 0 = 1/sqrt(D) */\n"
                                                  : "  uint32_t reserved;\n");
    for (const Argument& a : op.arguments) {
      const std::string text = text_of(a);
      const std::string comment = text.empty() ? "" : " /* " + text + " */";
      if (a.name == std::string_view("block_ids"))
        std::printf("  MSA_RENAMED(const msa_tensor*, block_ids, ids);%s\n", comment.c_str());
      else
        std::printf("  const msa_%s* %s;%s\n", a.is_tensor() ? "tensor" : "batch", a.name,
                    comment.c_str());
    }
    std::printf(
        "} msa_%s_params;\nMSA_API msa_status msa_run_%s(const msa_plan* plan, const "
        "msa_%s_params* "
        "params,\n    void* workspace, size_t workspace_bytes, const msa_queue* queue);\n",
        name.c_str(), name.c_str(), name.c_str());
  }
  std::printf(
      "\n/* The layer under its old name, until 0.3. */\n"
      "typedef msa_layer_params msa_layer_decode_params;\n"
      "MSA_API MSA_DEPRECATED(\"msa_run_layer\") msa_status\n"
      "    msa_run_layer_decode(const msa_plan* plan, const msa_layer_params* params, void* "
      "workspace,\n                         size_t workspace_bytes, const msa_queue* queue);\n");
  std::printf(
      "\n/* X(NAME, first operator that takes the struct) for each of them. */\n"
      "#define MSA_FOR_EACH_PARAMS(X)%s\n",
      list.c_str());
  return 0;
}
