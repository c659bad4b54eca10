// Threads over a range. Only its length and the number of parts decide where it is cut.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

namespace rbfast {

// Calls f(part, first, last) for `parts` consecutive runs of [0, total), each in its own thread, or in the caller's if
// the system has no threads left. Rethrows the exception of the first part that threw.
template <typename F>
void parallel_parts(int64_t total, int64_t parts, const F& f) {
  std::vector<std::exception_ptr> errors(parts);
  const auto guarded = [&](int64_t part) {
    try {
      f(part, total * part / parts, total * (part + 1) / parts);
    } catch (...) {
      errors[part] = std::current_exception();
    }
  };
  std::vector<std::thread> threads;
  for (int64_t part = 1; part < parts; ++part) {
    try {
      threads.emplace_back(guarded, part);
    } catch (const std::system_error&) {
      guarded(part);
    }
  }
  guarded(0);
  for (auto& thread : threads) thread.join();
  for (const auto& error : errors)
    if (error) std::rethrow_exception(error);
}

}  // namespace rbfast
