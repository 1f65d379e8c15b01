#include "msa/picture.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <iterator>
#include <string_view>

#include "msa/arrays.h"

namespace msa::cli {
namespace {

// Geometry in CSS pixels. A panel: histogram on top, map below, coverage to the right.
constexpr double kMap = 400, kSide = 64, kTop = 58, kGap = 10, kAxis = 58, kFoot = 46;
constexpr double kPanelWidth = kAxis + kMap + kGap + kSide + 34;
constexpr double kPanelHeight = 30 + kTop + kGap + kMap + kFoot;
constexpr double kHeader = 84, kFooter = 62, kMargin = 22;
constexpr int64_t kMaxRows = 256, kMaxColumns = 512;

constexpr const char* kInk = "#1c2733";
constexpr const char* kMuted = "#6a7785";
constexpr const char* kLine = "#d9e0e7";
constexpr const char* kAccent = "#e4632d";
constexpr int kLevels = 15;  // and level 0, not visible

std::string number(double value) {
  return fmt::format("{}", fmt::group_digits(std::lround(value)));
}

std::string escape(std::string_view text) {
  std::string out;
  for (char c : text) {
    switch (c) {
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '&':
        out += "&amp;";
        break;
      case '"':
        out += "&quot;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

/// Pale blue to midnight, through the square root so that small shares can be told apart.
std::array<uint8_t, 3> colour(int level) {
  constexpr double kAnchors[][3] = {{240, 244, 248}, {190, 218, 232}, {104, 174, 208},
                                    {38, 116, 176},  {18, 62, 122},   {10, 24, 62}};
  const double at = (level - 1.0) / (kLevels - 1) * (std::size(kAnchors) - 1);
  const size_t low = std::min(static_cast<size_t>(at), std::size(kAnchors) - 2);
  std::array<uint8_t, 3> rgb{};
  for (size_t c = 0; c < 3; ++c)
    rgb[c] = static_cast<uint8_t>(
        std::lround(kAnchors[low][c] +
                    (at - static_cast<double>(low)) * (kAnchors[low + 1][c] - kAnchors[low][c])));
  return rgb;
}

std::string hex(int level) {
  const auto rgb = colour(level);
  return fmt::format("#{:02x}{:02x}{:02x}", rgb[0], rgb[1], rgb[2]);
}

int level_of(float share) {
  return share < 0 ? 0 : 1 + static_cast<int>(std::lround(std::sqrt(share) * (kLevels - 1)));
}

std::string base64(std::string_view bytes) {
  constexpr char kAlphabet[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string out;
  for (size_t i = 0; i < bytes.size(); i += 3) {
    uint32_t group = 0;
    for (size_t j = 0; j < 3; ++j)
      group = group << 8 | (i + j < bytes.size() ? static_cast<uint8_t>(bytes[i + j]) : 0u);
    for (size_t j = 0; j < 4; ++j)
      out += i + j > bytes.size() ? '=' : kAlphabet[group >> (18 - 6 * j) & 63];
  }
  return out;
}

std::string big_endian(uint32_t value) {
  return {static_cast<char>(value >> 24), static_cast<char>(value >> 16),
          static_cast<char>(value >> 8), static_cast<char>(value)};
}

std::string png_chunk(std::string_view type, std::string_view data) {
  const std::string body = std::string(type) + std::string(data);
  uint32_t crc = ~0u;
  for (char c : body) {
    crc ^= static_cast<uint8_t>(c);
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1u ? 0xedb88320u : 0u);
  }
  return big_endian(static_cast<uint32_t>(data.size())) + body + big_endian(~crc);
}

/// The map as a PNG of 4-bit palette indices, not compressed. Few columns are repeated, for viewers
/// that blur what they enlarge.
std::string png(const HeadStatistics& head) {
  const int64_t repeat = (kMaxRows + head.columns - 1) / head.columns;
  const int64_t width = head.columns * repeat;
  std::string raw;
  for (int64_t row = 0; row < head.rows; ++row) {
    raw += '\0';  // no filter
    for (int64_t x = 0; x < width; ++x) {
      const int level = level_of(head.share[static_cast<size_t>(row * head.columns + x / repeat)]);
      if (x % 2 == 0)
        raw += static_cast<char>(level << 4);
      else
        raw.back() = static_cast<char>(raw.back() | level);
    }
  }
  std::string zlib = "\x78\x01";
  for (size_t at = 0; at < raw.size(); at += 0xffff) {  // stored blocks
    const uint32_t size = static_cast<uint32_t>(std::min<size_t>(0xffff, raw.size() - at));
    zlib += at + size == raw.size() ? '\1' : '\0';
    for (uint32_t value : {size, ~size}) {
      zlib += static_cast<char>(value);
      zlib += static_cast<char>(value >> 8);
    }
    zlib += raw.substr(at, size);
  }
  uint32_t a = 1, b = 0;  // Adler-32
  for (char c : raw) {
    a = (a + static_cast<uint8_t>(c)) % 65521;
    b = (b + a) % 65521;
  }
  zlib += big_endian(b << 16 | a);
  std::string palette(3, '\xff');
  for (int level = 1; level <= kLevels; ++level)
    for (uint8_t part : colour(level)) palette += static_cast<char>(part);
  return "\x89PNG\r\n\x1a\n" +
         png_chunk("IHDR", big_endian(static_cast<uint32_t>(width)) +
                               big_endian(static_cast<uint32_t>(head.rows)) +
                               std::string("\4\3\0\0\0", 5)) +
         png_chunk("PLTE", palette) + png_chunk("tRNS", std::string(1, '\0')) +
         png_chunk("IDAT", zlib) + png_chunk("IEND", "");
}

/// Round steps that cut [0, limit] into three to six parts.
int64_t tick_step(int64_t limit) {
  int64_t step = 1;
  while (limit / step > 5) step *= 2;
  return step;
}

/// Accumulates SVG.
class Canvas {
 public:
  void text(double x, double y, std::string_view what, std::string_view style) {
    add("<text x=\"{:.1f}\" y=\"{:.1f}\" {}>{}</text>\n", x, y, style, what);
  }
  void line(double x1, double y1, double x2, double y2, const char* stroke,
            std::string_view style = "") {
    add("<line x1=\"{:.1f}\" y1=\"{:.1f}\" x2=\"{:.1f}\" y2=\"{:.1f}\" stroke=\"{}\" {}/>\n", x1,
        y1, x2, y2, stroke, style);
  }
  void rect(double x, double y, double w, double h, std::string_view style) {
    add("<rect x=\"{:.2f}\" y=\"{:.2f}\" width=\"{:.2f}\" height=\"{:.2f}\" {}/>\n", x, y, w, h,
        style);
  }
  template <class... Arguments>
  void add(fmt::format_string<Arguments...> format, Arguments&&... arguments) {
    fmt::format_to(std::back_inserter(svg_), format, std::forward<Arguments>(arguments)...);
  }
  std::string take() { return std::move(svg_); }

 private:
  std::string svg_;
};

constexpr const char* kLabel = "class=\"m\"";
constexpr const char* kLabelMiddle = "class=\"m\" text-anchor=\"middle\"";
constexpr const char* kLabelEnd = "class=\"m\" text-anchor=\"end\"";

/// Tokens along both sides of the map whose top left corner is (x, y).
void draw_axes(Canvas* canvas, const Selection& s, const HeadStatistics& head, double x, double y) {
  const double keys = static_cast<double>(head.columns * head.column_blocks * s.block) / kMap;
  const double queries = static_cast<double>(head.rows * head.row_tokens) / kMap;
  const int64_t step = tick_step(s.tokens);
  for (int64_t tick = 0; tick <= s.tokens; tick += step) {
    const double right = x + static_cast<double>(tick) / keys;
    const double down = y + static_cast<double>(tick) / queries;
    canvas->line(right, y + kMap, right, y + kMap + 4, kMuted);
    canvas->line(x - 4, down, x, down, kMuted);
    canvas->text(right, y + kMap + 17, number(static_cast<double>(tick)), kLabelMiddle);
    canvas->text(x - 8, down + 4, number(static_cast<double>(tick)), kLabelEnd);
  }
  canvas->text(x + kMap / 2, y + kMap + 36, "key position (tokens)", kLabelMiddle);
  canvas->add(
      "<text transform=\"translate({:.1f},{:.1f}) rotate(-90)\" {}>query position "
      "(tokens)</text>\n",
      x - 50, y + kMap / 2, kLabelMiddle);
}

/// How many queries read each block, above the map; a few sinks may stick out of the top.
void draw_list_lengths(Canvas* canvas, const HeadStatistics& head, double x, double y) {
  const double longest = *std::max_element(head.list_length.begin(), head.list_length.end());
  const double top = std::max(1.0, std::min(longest, 2 * head.p90));
  const double step = kMap / static_cast<double>(head.columns);
  std::string path = fmt::format("M{:.1f},{:.1f}", x, y + kTop);
  for (int64_t column = 0; column < head.columns; ++column)
    path += fmt::format(
        "V{:.1f}h{:.3f}",
        y + kTop * (1 - std::min(1.0, head.list_length[static_cast<size_t>(column)] / top)), step);
  canvas->add("<path d=\"{}V{:.1f}z\" fill=\"{}\"/>\n", path, y + kTop, hex(8));
  const double median = y + kTop * (1 - head.p50 / top);
  canvas->line(x, median, x + kMap, median, kAccent, "stroke-dasharray=\"3 3\"");
  canvas->line(x, y + kTop, x + kMap, y + kTop, kLine);
  canvas->text(x - 8, y + 8, number(top), kLabelEnd);
  canvas->text(x - 8, y + kTop + 3, "0", kLabelEnd);
  canvas->text(
      x + kMap, y - 5,
      fmt::format("queries that read a block: p10 {} · <tspan fill=\"{}\">p50 {}</tspan> · "
                  "p90 {} · max {}",
                  number(head.p10), kAccent, number(head.p50), number(head.p90), number(longest)),
      kLabelEnd);
}

/// Selected share of the visible blocks, to the right of the map.
void draw_coverage(Canvas* canvas, const HeadStatistics& head, double x, double y) {
  const double step = kMap / static_cast<double>(head.rows);
  std::string path = fmt::format("M{:.1f},{:.1f}", x, y);
  for (double share : head.coverage) path += fmt::format("H{:.1f}v{:.3f}", x + kSide * share, step);
  canvas->add("<path d=\"{}H{:.1f}z\" fill=\"{}\"/>\n", path, x, hex(5));
  canvas->line(x, y, x, y + kMap, kLine);
  canvas->line(x + kSide, y, x + kSide, y + kMap, kLine, "stroke-dasharray=\"2 3\"");
  canvas->text(x + kSide, y + kMap + 17, "100 %", kLabelEnd);
  canvas->text(x + kSide / 2, y + kMap + 36, "blocks read", kLabelMiddle);
  canvas->text(x + kSide, y + kMap - 6, fmt::format("{:.1f} %", 100 * head.coverage.back()),
               "class=\"b\" text-anchor=\"end\"");
}

/// Blocks that neighbouring queries need together, in the empty corner above the diagonal.
void draw_overlap(Canvas* canvas, const Selection& s, const HeadStatistics& head, double x,
                  double y) {
  constexpr double kWidth = 158, kHeight = 58, kBar = 20, kPitch = 32;
  const double left = x + kMap - kWidth - 4, top = y + 36;
  canvas->text(left, top - 26, "Union of neighbours", "class=\"b\"");
  canvas->text(left, top - 12, fmt::format("blocks read together / {}", s.topk), kLabel);
  if (head.overlap.empty()) {
    canvas->text(left, top + 14, "every query reads all it sees", kLabel);
    return;
  }
  const double highest = std::max(2.0, *std::max_element(head.overlap.begin(), head.overlap.end()));
  for (size_t i = 0; i < head.overlap.size(); ++i) {
    const double at = left + kPitch * static_cast<double>(i);
    const double height = kHeight * head.overlap[i] / highest;
    canvas->rect(at, top + 16 + kHeight - height, kBar, height, fmt::format("fill=\"{}\"", hex(8)));
    canvas->text(at + kBar / 2, top + 12 + kHeight - height, fmt::format("{:.1f}", head.overlap[i]),
                 kLabelMiddle);
    canvas->text(at + kBar / 2, top + kHeight + 30, std::to_string(HeadStatistics::kWindows[i]),
                 kLabelMiddle);
  }
  canvas->text(left + kPitch * 2 + kBar / 2, top + kHeight + 44, "neighbouring queries",
               kLabelMiddle);
}

void draw_panel(Canvas* canvas, const Selection& s, int64_t index, double x, double y) {
  const HeadStatistics head = statistics(s, index);
  const double left = x + kAxis, top = y + 30 + kTop + kGap;
  canvas->text(left, y + 12, fmt::format("KV head {}", index), "class=\"h\"");
  draw_list_lengths(canvas, head, left, y + 30);
  canvas->add(
      "<image id=\"map{}\" x=\"{:.1f}\" y=\"{:.1f}\" width=\"{}\" height=\"{}\" "
      "preserveAspectRatio=\"none\" style=\"image-rendering:pixelated\" "
      "href=\"data:image/png;base64,{}\"/>\n",
      index, left, top, kMap, kMap, base64(png(head)));
  canvas->add("<path d=\"M{0:.1f},{1:.1f}v{2}h{2}\" fill=\"none\" stroke=\"{3}\"/>\n", left, top,
              kMap, kMuted);
  draw_axes(canvas, s, head, left, top);
  draw_coverage(canvas, head, left + kMap + kGap, top);
  draw_overlap(canvas, s, head, left, top);
}

void draw_legend(Canvas* canvas, double x, double y) {
  constexpr double kCell = 16;
  canvas->text(x, y - 8, "Share of the queries in a cell that read the block", kLabel);
  for (int level = 1; level <= kLevels; ++level)
    canvas->rect(x + kCell * (level - 1), y, kCell + 0.3, 10,
                 fmt::format("fill=\"{}\"", hex(level)));
  for (int percent : {0, 5, 25, 50, 100})
    canvas->text(x + 8 + kCell * (kLevels - 1) * std::sqrt(percent / 100.0), y + 24,
                 fmt::format("{}{}", percent, percent == 100 ? " %" : ""), kLabelMiddle);
}

}  // namespace

HeadStatistics statistics(const Selection& s, int64_t head) {
  HeadStatistics out;
  out.row_tokens = (s.tokens + kMaxRows - 1) / kMaxRows;
  out.rows = (s.tokens + out.row_tokens - 1) / out.row_tokens;
  out.column_blocks = (s.blocks() + kMaxColumns - 1) / kMaxColumns;
  out.columns = (s.blocks() + out.column_blocks - 1) / out.column_blocks;
  const auto cells = static_cast<size_t>(out.rows * out.columns);
  std::vector<double> read(cells), visible(cells), lengths(static_cast<size_t>(s.blocks()));
  for (int64_t query = 0; query < s.tokens; ++query) {
    const int64_t row = query / out.row_tokens * out.columns;
    for (int64_t block = 0; block < s.visible(query); ++block)
      ++visible[static_cast<size_t>(row + block / out.column_blocks)];
    for (int64_t slot = 0; slot < s.topk && s.list(head, query)[slot] >= 0; ++slot) {
      const int64_t block = s.list(head, query)[slot];
      ++read[static_cast<size_t>(row + block / out.column_blocks)];
      ++lengths[static_cast<size_t>(block)];
    }
  }
  for (size_t cell = 0; cell < cells; ++cell)
    out.share.push_back(visible[cell] > 0 ? static_cast<float>(read[cell] / visible[cell]) : -1);
  for (int64_t row = 0; row < out.rows; ++row) {
    double selected = 0, all = 0;
    for (int64_t column = 0; column < out.columns; ++column) {
      selected += read[static_cast<size_t>(row * out.columns + column)];
      all += visible[static_cast<size_t>(row * out.columns + column)];
    }
    out.coverage.push_back(selected / all);
  }
  for (int64_t column = 0; column < out.columns; ++column) {
    const int64_t first = column * out.column_blocks;
    const int64_t last = std::min(first + out.column_blocks, s.blocks());
    double sum = 0;
    for (int64_t block = first; block < last; ++block) sum += lengths[static_cast<size_t>(block)];
    out.list_length.push_back(sum / static_cast<double>(last - first));
  }
  const Quantiles quantile = quantiles(lengths);
  out.p10 = quantile.p10, out.p50 = quantile.median, out.p90 = quantile.p90;

  const int64_t first = s.topk * s.block;  // from here on a query chooses
  std::vector<int64_t> seen(static_cast<size_t>(s.blocks()), -1);
  for (int64_t window : HeadStatistics::kWindows) {
    int64_t blocks = 0, windows = 0;
    for (int64_t start = first; start + window <= s.tokens; start += window, ++windows) {
      for (int64_t query = start; query < start + window; ++query) {
        for (int64_t slot = 0; slot < s.topk; ++slot) {
          int64_t& mark = seen[static_cast<size_t>(s.list(head, query)[slot])];
          const int64_t stamp = start * 64 + window;  // unique to this window
          blocks += mark != stamp;
          mark = stamp;
        }
      }
    }
    if (windows == 0) break;
    out.overlap.push_back(static_cast<double>(blocks) / static_cast<double>(windows * s.topk));
  }
  return out;
}

std::string draw_svg(const Selection& s) {
  const int64_t across = std::min<int64_t>(s.heads, 2), down = (s.heads + across - 1) / across;
  const double width = std::max(2 * kMargin + static_cast<double>(across) * kPanelWidth, 760.0);
  const double height = kHeader + static_cast<double>(down) * (kPanelHeight + 16) + kFooter;
  Canvas canvas;
  canvas.add(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {0:.0f} {1:.0f}\" "
      "width=\"{0:.0f}\" height=\"{1:.0f}\" font-family=\"Inter,'Helvetica Neue',"
      "'Liberation Sans',Arial,sans-serif\">\n<title>{2}</title>\n<style>"
      ".m{{font-size:11px;fill:{3}}}.b{{font-size:11px;fill:{4};font-weight:600}}"
      ".h{{font-size:14px;fill:{4};font-weight:600}}</style>\n"
      "<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n",
      width, height, escape(s.title), kMuted, kInk);
  canvas.text(kMargin, 38, escape(s.title),
              fmt::format("font-size=\"22\" font-weight=\"700\" fill=\"{}\"", kInk));
  canvas.text(kMargin, 60, escape(s.subtitle), fmt::format("font-size=\"13\" fill=\"{}\"", kMuted));
  for (int64_t head = 0; head < s.heads; ++head)
    draw_panel(&canvas, s, head, kMargin + static_cast<double>(head % across) * kPanelWidth,
               kHeader + static_cast<double>(head / across) * (kPanelHeight + 16));
  draw_legend(&canvas, kMargin + kAxis, height - kFooter + 24);
  canvas.add("</svg>\n");
  return canvas.take();
}

std::string draw_html(const Selection& s) {
  std::string data;
  for (int64_t index = 0; index < s.heads; ++index) {
    const HeadStatistics head = statistics(s, index);
    std::string cells;
    for (float share : head.share)
      cells += static_cast<char>(share < 0 ? 255 : std::lround(share * 250));
    data += fmt::format("{{rows:{},columns:{},tokens:{},keys:{},cells:atob('{}')}},\n", head.rows,
                        head.columns, head.row_tokens, head.column_blocks * s.block, base64(cells));
  }
  Canvas page;
  page.add("<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{}</title>\n",
           escape(s.title));
  return page.take() + R"(<style>
body{margin:0;display:flex;justify-content:center;background:#f6f8fa}
svg{max-width:100%;height:auto;box-shadow:0 1px 12px #1c273322}
#tip{position:fixed;display:none;max-width:26rem;padding:.6rem .8rem;border-radius:6px;
 background:#1c2733f2;color:#fff;font:12px/1.5 Inter,Arial,sans-serif;pointer-events:none}
#tip code{display:block;color:#bedae8;white-space:pre-wrap;word-break:break-all}
</style></head><body>
)" + draw_svg(s) +
         "<div id=\"tip\"></div>\n<script>\nconst total=" + std::to_string(s.tokens) +
         ",text=new TextDecoder('latin1').decode(Uint8Array.from(atob('" + base64(s.text) +
         "'),c=>c.charCodeAt(0)));\nconst heads=[" + data + R"(];
const tip=document.getElementById('tip'),n=x=>x.toLocaleString('en');
const quote=(from,to)=>{const c=document.createElement('code');
 c.textContent=text.slice(from,Math.min(to,from+120));return c};
heads.forEach((h,i)=>{const map=document.getElementById('map'+i);
 map.onmouseleave=()=>tip.style.display='none';
 map.onmousemove=e=>{const r=map.getBoundingClientRect();
  const row=Math.min(h.rows-1,Math.floor((e.clientY-r.top)/r.height*h.rows));
  const column=Math.min(h.columns-1,Math.floor((e.clientX-r.left)/r.width*h.columns));
  const share=h.cells.charCodeAt(row*h.columns+column);
  if(share===255){tip.style.display='none';return}
  const q=[row*h.tokens,Math.min(total,(row+1)*h.tokens)];
  const k=[column*h.keys,Math.min(total,(column+1)*h.keys)];
  tip.replaceChildren(`Queries ${n(q[0])} to ${n(q[1]-1)}: ${(share/2.5).toFixed(1)} % read`,
   document.createElement('br'),`tokens ${n(k[0])} to ${n(k[1]-1)}`);
  if(text)tip.append(quote(...k));
  tip.style.display='block';
  tip.style.left=Math.min(e.clientX+14,innerWidth-tip.offsetWidth-8)+'px';
  tip.style.top=Math.min(e.clientY+14,innerHeight-tip.offsetHeight-8)+'px'}});
</script></body></html>
)";
}

}  // namespace msa::cli
