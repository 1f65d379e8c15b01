// What the subcommands share: common flags, errors, progress, files, the machine's description.
#pragma once

#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdint>
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

/// Prints `msa: error: ...` as one line on stderr and returns kBadInput.
int fail(std::string_view text);
int fail(const Status& status);

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

/// Ctrl-C: clear the progress line, remove the file being written, exit with 130. Called by main.
void install_interrupt_handler();

/// Ok if `path` can be written (directory there, not a directory itself, permission); touches
/// nothing. Call it before long work. "" (not asked for) and "-" (stdout) are fine.
Status check_writable(const std::filesystem::path& path);

/// Calls `write(temporary)` with a new path in the directory of `path`, then renames it to `path`;
/// on an error the temporary is removed and `path` is as before. Devices and pipes are written
/// directly.
Status write_atomically(const std::filesystem::path& path,
                        const std::function<Status(const std::filesystem::path&)>& write);
/// The same for contents in memory; "-" is stdout, "" does nothing.
Status write_file(const std::filesystem::path& path, std::string_view contents);
/// Pretty JSON with a final newline, as write_file. Numbers that are not finite become null.
Status write_json(const std::filesystem::path& path, const nlohmann::ordered_json& json);

/// The first `max_bytes` bytes of a file or pipe (fewer if it is shorter).
Status read_text(const std::filesystem::path& path, int64_t max_bytes, std::string* out);

/// The operators by name, for --op.
std::vector<std::string> op_names();

/// {cpu, cores, memory_gib, os, compiler, build}.
nlohmann::ordered_json machine();
/// Commit of this build, or "unknown".
const char* commit();

/// "1.2 s", "340 ms", "56 us".
std::string human_seconds(double seconds);

}  // namespace msa::cli
