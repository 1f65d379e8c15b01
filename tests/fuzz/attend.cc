// `msa attend` on any file and any flags: a result or an error, on the reference backend and on the
// one that `auto` takes. Layout of the input: eight bytes of flags, then a safetensors file.
#include "msa/attend.h"

#include <cstdlib>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 8) return 0;
  constexpr const char* kOps[] = {"", "index_select", "sparse_attention", "dense_attention", "msa"};
  const msa::cli::AttendOptions options{.op = kOps[data[0] % std::size(kOps)],
                                        .backend = data[1] % 2 == 0 ? "auto" : "reference",
                                        .block = data[2] % 65,
                                        .topk = data[3] % 33,
                                        .init_blocks = data[4] % 5,
                                        .local_blocks = data[5] % 5,
                                        .scale = static_cast<float>(data[6]) / 16,
                                        .causal = data[7] % 2 == 0,
                                        .check = (data[7] & 2) != 0};
  static msa::Threads threads(1);
  msa::cli::AttendResult result;
  const msa::Status status =
      msa::cli::attend(std::as_bytes(std::span(data + 8, size - 8)), options, threads, &result);
  if (!status && status.message().empty()) std::abort();
  return 0;
}
