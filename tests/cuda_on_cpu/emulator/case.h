// One test case: named buffers and numbers from stdin, results to stdout (written and read by
// tests/cuda_on_cpu/emulate.py).
//
//   in NAME BYTES\n<bytes>     a buffer with contents
//   inout NAME BYTES\n<bytes>  the same, sent back
//   out NAME BYTES\n           a buffer to be written, in full, and sent back
//   zeros NAME BYTES\n         a buffer of zeros (a workspace's counters)
//   number NAME VALUE\n        word NAME VALUE\n        end\n
#pragma once
#include <map>
#include <string>

#include "core/cuda/device.h"

namespace emulator {

class Case {
 public:
  Case();  // reads stdin

  bool has(const std::string& name) const;
  double number(const std::string& name) const;
  double number(const std::string& name, double otherwise) const;
  std::string word(const std::string& name) const;
  int64_t integer(const std::string& name) const { return static_cast<int64_t>(number(name)); }

  // Null for a buffer that was not given.
  template <typename T>
  T* pointer(const std::string& name) const {
    const auto found = buffers_.find(name);
    return found == buffers_.end() ? nullptr : static_cast<T*>(found->second.data);
  }

  // The numbers sm, multiprocessors and shared_bytes; an H100's where not given.
  saltire::cuda::Device device() const;

  // A line of text to send back, for plans.
  void tell(const std::string& name, const std::string& text);

  // Sends everything back; stops if an output holds bytes that were never written.
  void finish();

 private:
  struct Buffer {
    void* data;
    size_t bytes;
    bool back;
  };
  std::map<std::string, Buffer> buffers_;
  std::map<std::string, double> numbers_;
  std::map<std::string, std::string> words_;
  std::map<std::string, std::string> texts_;
};

// Runs `body` on the case; an exception becomes a message on stderr and exit status 4.
int run_case(void (*body)(Case&));

}  // namespace emulator
