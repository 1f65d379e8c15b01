// Errors are values: every call that can fail returns a Status, and nothing is thrown or printed.
#pragma once

#include <string>
#include <utility>

namespace msa {

enum class StatusCode : int {
  kOk = 0,
  kInvalidArgument = 1,  ///< an argument breaks the contract of the operator
  kUnsupported = 2,      ///< legal, but no (or not this) backend does it
  kUnavailable = 3,      ///< a backend, device or resource is not there
  kIo = 4,               ///< a file cannot be read or written
  kInternal = 5,         ///< a defect of this library
  kNumeric = 6,          ///< valid inputs, but a result that is no finite number
};

/// Outcome of a call. The message names the argument, what was given and what is supported.
class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}

  bool ok() const { return code_ == StatusCode::kOk; }
  explicit operator bool() const { return ok(); }
  StatusCode code() const { return code_; }
  /// One line without a full stop; empty when ok.
  const std::string& message() const { return message_; }

 private:
  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

}  // namespace msa

/// Returns from the enclosing function when `expression` (a Status) is an error.
#define MSA_TRY(expression)                                                                       \
  do {                                                                                            \
    if (::msa::Status msa_try_status = (expression); !msa_try_status.ok()) return msa_try_status; \
  } while (false)
