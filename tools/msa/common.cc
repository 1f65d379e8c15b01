#include "msa/common.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <system_error>
#include <thread>

#ifndef MSA_COMMIT
#define MSA_COMMIT "unknown"
#endif

namespace msa::cli {
namespace {

namespace fs = std::filesystem;

// Read by the signal handler: the progress line on the screen, the temporary file being written.
volatile std::sig_atomic_t bar_on_screen = 0;
char pending_file[4096] = "";

void clear_line() {
  constexpr char kClear[] = "\r\033[K\033[?25h";
  if (bar_on_screen) (void)!write(STDERR_FILENO, kClear, sizeof kClear - 1);
  bar_on_screen = 0;
}

extern "C" void on_interrupt(int signal) {
  clear_line();
  if (pending_file[0] != '\0') unlink(pending_file);
  _exit(128 + signal);
}

Status io_error(const fs::path& path, std::string_view what) {
  return Status(StatusCode::kIo, fmt::format("{}: {}", path.string(), what));
}

/// The file a path stands for: symbolic links are followed, so that a rename keeps them.
fs::path target_of(const fs::path& path) {
  std::error_code ignored;
  const fs::path resolved = fs::weakly_canonical(path, ignored);
  return resolved.empty() ? path : resolved;
}

bool is_special(const fs::path& path) {  // a device or pipe: cannot be replaced by a rename
  std::error_code ignored;
  return fs::exists(path, ignored) && !fs::is_regular_file(path, ignored);
}

std::string first_line_with(const char* file, std::string_view key) {
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);) {
    if (line.starts_with(key)) return line.substr(line.find_first_not_of(" \t:", key.size()));
  }
  return "unknown";
}

}  // namespace

void add_common(CLI::App* command, Common* common) {
  command->add_option("--backend", common->backend,
                      "auto, or a name from `msa info`; the environment's MSA_BACKEND steers auto");
  command->add_option("--threads", common->threads, "CPU threads, 0 = all")
      ->check(CLI::Range(0, 1024));
  command->add_flag("--quiet", common->quiet, "No progress bar, results only");
}

int fail(std::string_view text) {
  clear_line();
  std::string line(text);
  for (char& c : line)
    if (static_cast<unsigned char>(c) < ' ') c = ' ';
  fmt::print(stderr, "msa: error: {}\n", line);
  return kBadInput;
}

int fail(const Status& status) { return fail(status.message()); }

Progress::Progress(std::string label, bool quiet)
    : label_(std::move(label)), enabled_(!quiet && isatty(STDERR_FILENO) == 1) {}

Progress::~Progress() { clear_line(); }

void Progress::update(int64_t done, int64_t total) {
  const Clock::time_point now = Clock::now();
  const double elapsed = std::chrono::duration<double>(now - start_).count();
  if (!enabled_ || elapsed < 1 || now - shown_ < std::chrono::milliseconds(100)) return;
  shown_ = now;
  constexpr int kWidth = 28;
  const double fraction =
      total > 0 ? std::clamp(static_cast<double>(done) / static_cast<double>(total), 0.0, 1.0) : 0;
  const int filled = static_cast<int>(fraction * kWidth);
  std::string bar;
  for (int i = 0; i < kWidth; ++i) bar += i < filled ? "━" : "╌";
  const std::string left =
      fraction > 0 ? human_seconds(elapsed * (1 - fraction) / fraction) + " left" : "";
  bar_on_screen = 1;
  fmt::print(stderr, "\r\033[?25l\033[K{} {} {:3.0f}%  {}", label_, bar, 100 * fraction, left);
  std::fflush(stderr);
}

void install_interrupt_handler() {
  for (int signal : {SIGINT, SIGTERM}) std::signal(signal, on_interrupt);
}

Status check_writable(const fs::path& path) {
  if (path.empty() || path == "-") return {};
  const fs::path target = target_of(path);
  std::error_code ignored;
  if (fs::is_directory(target, ignored)) return io_error(path, "is a directory, expected a file");
  const fs::path directory = target.has_parent_path() ? target.parent_path() : fs::path(".");
  if (!fs::is_directory(directory, ignored))
    return io_error(path, fmt::format("cannot be written, no directory {}", directory.string()));
  const fs::path& written = is_special(target) ? target : directory;
  if (access(written.c_str(), W_OK) != 0)
    return io_error(path, fmt::format("cannot be written, {}", std::strerror(errno)));
  return {};
}

Status write_atomically(const fs::path& path, const std::function<Status(const fs::path&)>& write) {
  MSA_TRY(check_writable(path));
  const fs::path target = target_of(path);
  if (is_special(target)) return write(target);
  const std::string temporary = fmt::format("{}.tmp{}", target.string(), getpid());
  if (temporary.size() >= sizeof pending_file) return io_error(path, "name too long");
  std::memcpy(pending_file, temporary.c_str(), temporary.size() + 1);
  Status status = write(temporary);
  if (status.ok() && std::rename(temporary.c_str(), target.c_str()) != 0)
    status = io_error(path, fmt::format("cannot be written, {}", std::strerror(errno)));
  if (!status.ok()) unlink(temporary.c_str());
  pending_file[0] = '\0';
  return status;
}

Status write_file(const fs::path& path, std::string_view contents) {
  if (path.empty()) return {};
  if (path == "-") {
    const bool written =
        std::fwrite(contents.data(), 1, contents.size(), stdout) == contents.size() &&
        std::fflush(stdout) == 0;
    return written ? Status() : io_error("stdout", std::strerror(errno));
  }
  return write_atomically(path, [&](const fs::path& temporary) {
    std::ofstream out(temporary, std::ios::binary);
    out.write(contents.data(), static_cast<std::streamsize>(contents.size()));
    out.close();
    return out ? Status()
               : io_error(path, fmt::format("cannot be written, {}", std::strerror(errno)));
  });
}

Status write_json(const fs::path& path, const nlohmann::ordered_json& json) {
  return write_file(path,
                    json.dump(1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n");
}

Status read_text(const fs::path& path, int64_t max_bytes, std::string* out) {
  std::error_code ignored;
  if (fs::is_directory(path, ignored)) return io_error(path, "is a directory, expected a file");
  std::ifstream in(path, std::ios::binary);
  if (!in) return io_error(path, fmt::format("cannot be read, {}", std::strerror(errno)));
  constexpr int64_t kChunk = int64_t{1} << 20;
  out->clear();
  while (in && static_cast<int64_t>(out->size()) < max_bytes) {
    const size_t old = out->size();
    const int64_t want = std::min(kChunk, max_bytes - static_cast<int64_t>(old));
    out->resize(old + static_cast<size_t>(want));
    in.read(out->data() + old, want);
    out->resize(old + static_cast<size_t>(in.gcount()));
  }
  return in.bad() ? io_error(path, "cannot be read") : Status();
}

std::vector<std::string> op_names() {
  std::vector<std::string> names;
  for (int op = 0; op < kOpCount; ++op) names.emplace_back(name_of(static_cast<Op>(op)));
  return names;
}

nlohmann::ordered_json machine() {
  utsname os{};
  uname(&os);
  const double bytes =
      static_cast<double>(sysconf(_SC_PHYS_PAGES)) * static_cast<double>(sysconf(_SC_PAGESIZE));
  return {{"cpu", first_line_with("/proc/cpuinfo", "model name")},
          {"cores", std::thread::hardware_concurrency()},
          {"memory_gib", std::round(bytes / (1 << 30) * 10) / 10},
          {"os", fmt::format("{} {}", os.sysname, os.machine)},
#ifdef __clang__
          {"compiler", "clang " __clang_version__},
#else
          {"compiler", "gcc " __VERSION__},
#endif
#ifdef NDEBUG
          {"build", "release"}};
#else
          {"build", "debug"}};
#endif
}

const char* commit() { return MSA_COMMIT; }

std::string human_seconds(double seconds) {
  if (seconds >= 90)
    return fmt::format("{:.0f}m{:02.0f}s", std::floor(seconds / 60),
                       std::floor(std::fmod(seconds, 60)));
  if (seconds >= 1) return fmt::format("{:.2f} s", seconds);
  if (seconds >= 1e-3) return fmt::format("{:.2f} ms", seconds * 1e3);
  return fmt::format("{:.2f} us", seconds * 1e6);
}

}  // namespace msa::cli
