// What the subcommands share: common flags, errors, progress, files, the machine's description.
#pragma once

#include <fmt/format.h>
#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "msa/msa.h"

namespace msa::cli {

inline constexpr int kOk = 0;
inline constexpr int kFailedCheck = 1;
inline constexpr int kBadInput = 2;

/// Flags of every command.
struct Common {
  std::string backend = "auto";
  int threads = 0;  ///< 0 = all of the machine's
  bool quiet = false;
};

/// Adds --backend, --threads and --quiet.
void add_common(CLI::App* command, Common* common);

/// An error about what was given, in fmt's words.
template <class... Arguments>
Status bad_input(fmt::format_string<Arguments...> format, Arguments&&... arguments) {
  return {StatusCode::kInvalidArgument, fmt::format(format, std::forward<Arguments>(arguments)...)};
}

/// Prints `msa: error: ...` as one line on stderr and returns kBadInput.
int fail(std::string_view text);
/// The same; kFailedCheck for kNumeric.
int fail(const Status& status);
/// Prints `msa: note: ...` as one line on stderr, under --quiet too.
void note(std::string_view text);

/// A bar with the time left on stderr, only if that is a terminal and the work takes longer than a
/// second. The line is cleared at the end of its life; Ctrl-C clears it too.
class Progress {
 public:
  Progress(std::string label, bool quiet);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  void update(int64_t done, int64_t total);

 private:
  using Clock = std::chrono::steady_clock;
  std::string label_;
  bool enabled_;
  Clock::time_point start_ = Clock::now();
  Clock::time_point shown_{};
};

/// Ctrl-C: clear the progress line, remove the file being written, exit with 130. A file over the
/// limit of `ulimit -f` is an error of the write. Called by main.
void install_signal_handlers();

/// True for "-", "/dev/stdout" and the like: what is written there stands in place of the text.
bool is_stdout(const std::filesystem::path& path);

/// Ok if write_atomically can write `path` (directory there, not a directory itself, permission);
/// touches nothing. Call it before long work.
Status check_writable(const std::filesystem::path& path);

/// The one way to write a file: `write` fills a new file in the folder of `path`, which then takes
/// the name; on an error it is removed, and what `path` named before is whole. Symbolic links are
/// followed, permissions kept. "-" and whatever else is stdout or stderr go to these streams,
/// other devices and pipes are opened as they are; "" does nothing. Errors name the path and why.
Status write_atomically(const std::filesystem::path& path,
                        const std::function<Status(std::FILE*)>& write);
/// The same for contents in memory.
Status write_file(const std::filesystem::path& path, std::string_view contents);
/// Pretty JSON with a final newline, as write_file. Numbers that are not finite become null.
Status write_json(const std::filesystem::path& path, const nlohmann::ordered_json& json);

/// The first `max_bytes` bytes of a file or pipe (fewer if it is shorter).
Status read_text(const std::filesystem::path& path, int64_t max_bytes, std::string* out);

/// The operators by name, for --op.
std::vector<std::string> op_names();
/// `name`, or what has replaced it, with a warning.
std::string current_op_name(const std::string& name);

/// {cpu, cores, memory_gib, os, compiler, build}.
nlohmann::ordered_json machine();
/// Commit of this build, or "unknown".
const char* commit();

/// "1.2 s", "340 ms", "56 us".
std::string human_seconds(double seconds);

}  // namespace msa::cli
