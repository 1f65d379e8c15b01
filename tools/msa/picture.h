// The picture of `msa inspect`: a selection map per KV head, with coverage, list lengths and the
// overlap of neighbouring queries.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace msa::cli {

/// Block ids of one layer over a whole text.
struct Selection {
  std::string title, subtitle;
  int64_t tokens = 0;        ///< every one is a query
  int64_t heads = 0;         ///< KV heads
  int64_t block = 0;         ///< Bk
  int64_t topk = 0;          ///< K
  std::vector<int32_t> ids;  ///< [heads, tokens, K], -1 in the tail
  std::string text;          ///< the text itself, for tooltips; may be empty

  int64_t blocks() const { return (tokens + block - 1) / block; }
  int64_t visible(int64_t query) const { return query / block + 1; }
  const int32_t* list(int64_t head, int64_t query) const {
    return ids.data() + (head * tokens + query) * topk;
  }
};

/// Numbers of one KV head, as drawn.
struct HeadStatistics {
  static constexpr int kWindows[] = {2, 4, 8, 16, 32};

  int64_t rows = 0, columns = 0;     ///< bins of queries and of blocks
  int64_t row_tokens = 0;            ///< queries of a bin
  int64_t column_blocks = 0;         ///< blocks of a bin
  std::vector<float> share;          ///< [rows, columns] of the queries that read the block;
                                     ///< -1 where none can see it
  std::vector<double> coverage;      ///< [rows] selected share of the visible blocks
  std::vector<double> list_length;   ///< [columns] queries that read a block (mean of the bin)
  double p10 = 0, p50 = 0, p90 = 0;  ///< of the list lengths over blocks
  std::vector<double> overlap;       ///< per window: |union of the neighbours' lists| / K;
                                     ///< empty when no query sees more than K blocks
};

HeadStatistics statistics(const Selection& selection, int64_t head);

/// A complete SVG document; no scripts, no external files.
std::string draw_svg(const Selection& selection);
/// The same inside a page whose tooltips name queries, blocks and their text.
std::string draw_html(const Selection& selection);

}  // namespace msa::cli
