// The data that `msa bench` measures on: random tensors, paged caches, block lists.
#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <random>

#include "msa/bench_ops.h"
#include "msa/common.h"

namespace msa::cli {
Status Trace::open(const std::string& path, Trace* out) {
  MSA_TRY(model::SafetensorsFile::open(path, &out->file));
  for (int layer = 0; layer < 1024; ++layer) {
    const std::string name = fmt::format("layers.{}.block_ids", layer);
    if (out->file.find(name) == nullptr) continue;
    TensorView view;
    MSA_TRY(out->file.view(name, &view));
    if (view.dtype != DType::kI32 || view.rank != 3 || view.numel() == 0)
      return bad_input("{}: {} must be i32 [Hi,T,K]", path, name);
    out->layers.push_back(view);
  }
  if (out->layers.empty())
    return bad_input("{}: no tensor layers.N.block_ids; `msa eval --trace` writes them", path);
  return {};
}

TensorView Workload::input(const std::string& name, std::vector<int64_t> shape, DType dtype) {
  auto [entry, is_new] = arrays_.try_emplace(name);
  if (is_new) {
    entry->second = Array(dtype, shape);
    fill_normal(entry->second.view(), std::hash<std::string>()(name), threads_);
  }
  return entry->second.view();
}

TensorView Workload::output(const std::string& name, DType dtype, std::vector<int64_t> shape) {
  auto [entry, is_new] = arrays_.try_emplace("out " + name);
  if (is_new) entry->second = Array(dtype, shape);
  return entry->second.view();
}

Status Workload::poison_outputs() {
  for (const auto& [name, array] : arrays_) {
    if (!name.starts_with("out ")) continue;
    poison(array.view());
    if (const auto copy = copies_.find({name, 0}); copy != copies_.end())
      MSA_TRY(conformance::upload(copy->second.data(), array.data<std::byte>(),
                                  static_cast<size_t>(array.bytes())));
  }
  return {};
}

/// The same view of a copy of its array, which is made when first asked for.
Status Workload::on_device(const TensorView& host, int copy, TensorView* out) {
  *out = host;
  out->device = {DeviceKind::kCUDA, 0};
  const auto inside = [&](const auto& entry) {
    const auto* begin = entry.second.template data<std::byte>();
    const auto* at = static_cast<const std::byte*>(host.data);
    return at >= begin && at < begin + std::max<int64_t>(1, entry.second.bytes());
  };
  const auto array = std::find_if(arrays_.begin(), arrays_.end(), inside);
  if (!host.given() || array == arrays_.end()) return {};
  const auto bytes = static_cast<size_t>(array->second.bytes());
  auto [memory, is_new] = copies_.try_emplace({array->first, copy});
  if (is_new) {
    MSA_TRY(conformance::DeviceMemory::allocate(std::max<size_t>(bytes, 1), &memory->second));
    const auto first = copies_.find({array->first, 0});
    MSA_TRY(copy == 0 || first == copies_.end()
                ? conformance::upload(memory->second.data(), array->second.data<void>(), bytes)
                : conformance::copy_on_device(memory->second.data(), first->second.data(), bytes));
  }
  out->data = static_cast<std::byte*>(memory->second.data()) +
              (static_cast<std::byte*>(host.data) - array->second.data<std::byte>());
  return {};
}

Status Workload::on_device(const conformance::Params& host, int copy, conformance::Params* out) {
  *out = host;
  for (TensorView* view : conformance::arguments(*out))
    MSA_TRY(on_device(TensorView(*view), copy, view));
  return {};
}

/// Brings the outputs of copy 0 to the host.
Status Workload::fetch(conformance::Params params) {
  if (device_ == nullptr) return {};
  MSA_TRY(device_->wait());
  for (const conformance::Output& output : conformance::outputs(params)) {
    TensorView copy;
    MSA_TRY(on_device(*output.view, 0, &copy));
    MSA_TRY(conformance::download(output.view->data, copy.data,
                                  static_cast<size_t>(copy.numel() * size_of(copy.dtype))));
  }
  return {};
}

TensorView Workload::metadata(const std::string& name,
                              const std::function<std::vector<int32_t>()>& make) {
  auto [entry, is_new] = arrays_.try_emplace(name);
  if (is_new) entry->second = Array::i32(make());
  return entry->second.view();
}

Batch Workload::batch() {
  const auto steps = [&](int64_t step) {
    return [this, step] {
      std::vector<int32_t> sums;
      for (int64_t b = 0; b <= setting_.batch; ++b) sums.push_back(static_cast<int32_t>(b * step));
      return sums;
    };
  };
  Batch batch{.cu_seqlens_q = metadata("cu_seqlens_q", steps(setting_.new_tokens))};
  if (setting_.problem.layout == KvLayout::kPacked) {
    batch.cu_seqlens_k = metadata("cu_seqlens_k", steps(setting_.context));
    return batch;
  }
  const size_t count = static_cast<size_t>(setting_.batch);
  batch.seq_lens = metadata("seq_lens", [&] {
    return std::vector<int32_t>(count, static_cast<int32_t>(setting_.context));
  });
  batch.page_table = metadata("page_table", [&] {  // every page somewhere else
    std::vector<int32_t> pages(count * static_cast<size_t>(blocks()));
    std::iota(pages.begin(), pages.end(), 0);
    std::shuffle(pages.begin(), pages.end(), std::mt19937(1));
    return pages;
  });
  batch.page_table.rank = 2;
  batch.page_table.shape = {setting_.batch, blocks()};
  batch.page_table.stride = {blocks(), 1};
  return batch;
}

/// How many blocks each row sees.
TensorView Workload::visible_blocks() {
  return metadata("visible blocks", [&] {
    std::vector<int32_t> counts;
    for (int64_t row = 0; row < tokens(); ++row)
      counts.push_back(static_cast<int32_t>(visible(position(row))));
    return counts;
  });
}

/// Lists [parts,Hi,T,K] of which no two parts name a block in common.
TensorView Workload::distinct_lists(const std::string& name, const std::vector<int64_t>& shape) {
  const auto [entry, is_new] = arrays_.try_emplace(name);
  if (is_new) {
    entry->second = Array(DType::kI32, shape);
    const TensorView& view = entry->second.view();
    for (int64_t i = 0; i < view.numel(); ++i)
      view.at<int32_t>()[i] =
          static_cast<int32_t>(i / view.stride[0] * shape.back() + i % shape.back());
  }
  return entry->second.view();
}

/// The lists that attention reads, as --selection says.
Status Workload::ids(TensorView* out) {
  if (setting_.selection == "index") return result_of(Op::kIndexSelect, "block_ids", out);
  const auto [entry, is_new] = arrays_.try_emplace("block_ids");
  if (is_new) {
    entry->second = Array(DType::kI32, {hkv(), tokens(), topk()});
    if (setting_.trace != nullptr)
      MSA_TRY(trace_ids(entry->second.view()));
    else
      random_ids(entry->second.view());
  }
  *out = entry->second.view();
  return {};
}

/// The local block and K-1 others, uniform among the visible ones (Floyd's algorithm).
void Workload::random_ids(const TensorView& out) {
  threads_.parallel_for(tokens(), [&](int64_t row, int) {
    std::mt19937_64 random(static_cast<uint64_t>(row));
    const int64_t local = position(row) / setting_.problem.block_size;
    const int64_t others = std::min(topk() - 1, local);
    for (int64_t head = 0; head < hkv(); ++head) {
      int32_t* list = out.at<int32_t>(head, row);
      std::fill(list, list + topk(), -1);
      int64_t count = 0;
      for (int64_t last = local - others; last < local; ++last) {
        const auto pick = static_cast<int32_t>(random() % static_cast<uint64_t>(last + 1));
        const bool taken = std::find(list, list + count, pick) != list + count;
        list[count++] = taken ? static_cast<int32_t>(last) : pick;
      }
      std::sort(list, list + count);
      list[count] = static_cast<int32_t>(local);
    }
  });
}

/// KV heads beyond the trace's own come from its other layers.
Status Workload::trace_ids(const TensorView& out) {
  const std::vector<TensorView>& layers = setting_.trace->layers;
  const int64_t layer_heads = layers.front().shape[0];
  if (const int64_t heads = layer_heads * static_cast<int64_t>(layers.size()); heads < hkv())
    return bad_input(
        "--selection {}: {} layers of {} heads serve at most {} KV heads, "
        "the shape has {}",
        setting_.selection, layers.size(), layer_heads, heads, hkv());
  for (int64_t head = 0; head < hkv(); ++head) {
    const TensorView& layer = layers[static_cast<size_t>(head / layer_heads)];
    if (layer.shape[0] != layer_heads || layer.shape[1] < setting_.context ||
        layer.shape[2] != topk())
      return bad_input("--selection {}: lists are {}, expected [{},>={},{}]", setting_.selection,
                       model::shape_text(std::span(layer.shape.data(), 3)), layer_heads,
                       setting_.context, topk());
    for (int64_t row = 0; row < tokens(); ++row) {
      const int64_t count = visible(position(row));
      const int32_t* list = layer.at<const int32_t>(head % layer_heads, position(row));
      for (int64_t slot = 0; slot < topk(); ++slot) {
        const bool valid = slot < std::min(count, topk()) ? list[slot] >= 0 && list[slot] < count
                                                          : list[slot] == -1;
        if (!valid)
          return bad_input(
              "--selection {}: token {} slot {} names block {} of {} visible "
              "ones; was the trace made with blocks of {}?",
              setting_.selection, position(row), slot, list[slot], count,
              setting_.problem.block_size);
        *out.at<int32_t>(head, row, slot) = list[slot];
      }
    }
  }
  return {};
}

}  // namespace msa::cli
