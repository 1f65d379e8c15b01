#include "msa/common.h"

#include <fmt/format.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <system_error>
#include <thread>

#include "core/op_table.h"

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

Status write_error(const fs::path& path) {
  return io_error(path, fmt::format("cannot be written, {}", std::strerror(errno)));
}

/// What a path stands for: symbolic links are followed, also to a file that is not there yet, so
/// that a rename keeps them.
fs::path target_of(fs::path path) {
  constexpr int kMaxLinks = 40;
  std::error_code failed;
  for (int i = 0; i < kMaxLinks && fs::is_symlink(path, failed); ++i) {
    const fs::path next = fs::read_symlink(path, failed);
    if (failed) break;
    path = path.parent_path() / next;
  }
  return path;
}

fs::path directory_of(const fs::path& path) {
  return path.has_parent_path() ? path.parent_path() : fs::path(".");
}

/// stdout or stderr if `path` is the same file ("/dev/stdout"), else null: opened once more, it
/// would be written from its beginning, over what the stream has written.
std::FILE* own_stream(const fs::path& path) {
  if (path == "-") return stdout;
  struct stat there{}, here{};
  if (stat(path.c_str(), &there) != 0) return nullptr;
  for (std::FILE* stream : {stdout, stderr})
    if (fstat(fileno(stream), &here) == 0 && there.st_dev == here.st_dev &&
        there.st_ino == here.st_ino)
      return stream;
  return nullptr;
}

bool is_special(const fs::path& path) {  // a device or pipe: cannot be replaced by a rename
  std::error_code ignored;
  return fs::exists(path, ignored) && !fs::is_regular_file(path, ignored);
}

/// `write`, with the path in its error, and all that the stream still holds.
Status fill(const fs::path& path, std::FILE* stream,
            const std::function<Status(std::FILE*)>& write) {
  const Status status = write(stream);
  if (std::ferror(stream) != 0 || (status.ok() && std::fflush(stream) != 0))
    return write_error(path);
  if (status.ok()) return {};
  return {status.code(), fmt::format("{}: {}", path.string(), status.message())};
}

/// A new file beside `target`, with its permissions if it is there already.
std::FILE* create_beside(const fs::path& target, fs::path* temporary) {
  std::FILE* file = nullptr;
  for (int i = 0; file == nullptr && (i == 0 || errno == EEXIST); ++i) {
    *temporary = directory_of(target) / fmt::format(".msa-{}-{}.tmp", getpid(), i);
    file = std::fopen(temporary->c_str(), "wbxe");
  }
  struct stat old{};
  if (file != nullptr && stat(target.c_str(), &old) == 0) fchmod(fileno(file), old.st_mode & 07777);
  return file;
}

std::string first_line_with(const char* file, std::string_view key) {
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);) {
    if (line.starts_with(key)) return line.substr(line.find_first_not_of(" \t:", key.size()));
  }
  return "unknown";
}

void print_line(const char* kind, std::string_view text) {
  clear_line();
  std::string line(text);
  for (char& c : line)
    if (static_cast<unsigned char>(c) < ' ') c = ' ';
  fmt::print(stderr, "msa: {}: {}\n", kind, line);
}

}  // namespace

void add_common(CLI::App* command, Common* common) {
  command->add_option("--backend", common->backend,
                      "auto, or a name from `msa info`; the environment's MSA_BACKEND steers auto");
  command->add_option("--threads", common->threads, "CPU threads, 0 = all")
      ->check(CLI::Range(0, 1024));
  command->add_flag("--quiet", common->quiet, "No progress bar");
}

int fail(std::string_view text) {
  print_line("error", text);
  return kBadInput;
}

int fail(const Status& status) {
  fail(status.message());
  return status.code() == StatusCode::kNumeric ? kFailedCheck : kBadInput;
}

void note(std::string_view text) { print_line("note", text); }

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

void install_signal_handlers() {
  for (int signal : {SIGINT, SIGTERM}) std::signal(signal, on_interrupt);
  std::signal(SIGXFSZ, SIG_IGN);
}

bool is_stdout(const fs::path& path) { return own_stream(path) == stdout; }

Status check_writable(const fs::path& path) {
  if (path.empty() || own_stream(path) != nullptr) return {};
  std::error_code ignored;
  if (fs::is_directory(path, ignored)) return io_error(path, "is a directory, expected a file");
  if (fs::exists(path, ignored) && access(path.c_str(), W_OK) != 0) return write_error(path);
  if (is_special(path)) return {};
  const fs::path directory = directory_of(target_of(path));
  if (!fs::is_directory(directory, ignored))
    return io_error(path, fmt::format("cannot be written, no directory {}", directory.string()));
  if (access(directory.c_str(), W_OK) != 0) return write_error(path);
  return {};
}

Status write_atomically(const fs::path& path, const std::function<Status(std::FILE*)>& write) {
  if (path.empty()) return {};
  if (std::FILE* stream = own_stream(path)) return fill(path, stream, write);
  MSA_TRY(check_writable(path));
  const bool special = is_special(path);
  const fs::path target = target_of(path);
  fs::path temporary;
  std::FILE* file = special ? std::fopen(path.c_str(), "wbe") : create_beside(target, &temporary);
  if (file == nullptr) return write_error(path);
  if (temporary.native().size() < sizeof pending_file)
    std::memcpy(pending_file, temporary.c_str(), temporary.native().size() + 1);
  Status status = fill(path, file, write);
  if (status.ok() && !special && fsync(fileno(file)) != 0) status = write_error(path);
  if (std::fclose(file) != 0 && status.ok()) status = write_error(path);
  if (status.ok() && !special && std::rename(temporary.c_str(), target.c_str()) != 0)
    status = write_error(path);
  if (!status.ok() && !special) unlink(temporary.c_str());
  pending_file[0] = '\0';
  return status;
}

Status write_file(const fs::path& path, std::string_view contents) {
  return write_atomically(path, [&](std::FILE* file) {
    std::fwrite(contents.data(), 1, contents.size(), file);
    return Status();  // write_atomically asks the stream
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
  for (const OpInfo& op : all_ops()) names.emplace_back(op.name);
  return names;
}

std::string current_op_name(const std::string& name) {
  for (const OldName& old : old_names()) {
    if (name != old.name) continue;
    fmt::print(stderr, "msa: warning: {} is deprecated, its name is {}; gone in 0.3\n", name,
               name_of(old.op));
    return name_of(old.op);
  }
  return name;
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
