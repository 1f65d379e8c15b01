#include <cuda_bf16.h>

#include <algorithm>

#include "cuda/launch.h"
#include "cuda/sm90/backward/query_gradient.cuh"

namespace msa::cuda::sm90::backward {

template <int kGroup, class Out>
Status launch_query_gradient(const Maps& maps, const QueryGradientArgs& args, uint32_t sms,
                             cudaStream_t stream) {
  const int64_t most_tiles =
      (ceil_div(int64_t{args.batch.tokens}, int64_t{kRows / kGroup}) + args.batch.sequences + 1) *
      args.heads_kv;
  return launch("attention_backward (queries)", &query_gradient<kGroup, Out>,
                {.grid = static_cast<uint32_t>(std::min<int64_t>(most_tiles, sms)),
                 .block = kThreads,
                 .shared_bytes = sizeof(QueryGradientShared<kGroup>)},
                stream, maps, args);
}

template Status launch_query_gradient<16, __nv_bfloat16>(const Maps&, const QueryGradientArgs&,
                                                         uint32_t, cudaStream_t);
template Status launch_query_gradient<16, float>(const Maps&, const QueryGradientArgs&, uint32_t,
                                                 cudaStream_t);
template Status launch_query_gradient<8, __nv_bfloat16>(const Maps&, const QueryGradientArgs&,
                                                        uint32_t, cudaStream_t);
template Status launch_query_gradient<8, float>(const Maps&, const QueryGradientArgs&, uint32_t,
                                                cudaStream_t);

}  // namespace msa::cuda::sm90::backward
