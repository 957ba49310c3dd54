#include "case.h"

#include <cstring>
#include <exception>
#include <iostream>

#include "emulator.h"

namespace emulator {

Case::Case() {
  std::string kind, name;
  while (std::cin >> kind && kind != "end") {
    if (kind == "number") {
      double value = 0;
      std::cin >> name >> value;
      numbers_[name] = value;
      continue;
    }
    if (kind == "word") {
      std::string value;
      std::cin >> name >> value;
      words_[name] = value;
      continue;
    }
    size_t bytes = 0;
    std::cin >> name >> bytes;
    std::cin.get();
    const bool given = kind != "out";
    // cudaMalloc and torch align to 256 and 512 bytes; a tensor may start anywhere in its storage,
    // so `skew_NAME` moves one by some bytes, to the alignment of its elements.
    const auto skew = static_cast<size_t>(number("skew_" + name, 0));
    auto* whole =
        static_cast<char*>(allocate(name, bytes + skew, 256, given ? Fill::given : Fill::poison));
    char* const data = whole + skew;
    mark_written(whole, skew);
    if (kind == "in" || kind == "inout") std::cin.read(data, static_cast<std::streamsize>(bytes));
    if (kind == "zeros") std::memset(data, 0, bytes);
    buffers_[name] = {data, bytes, kind == "out" || kind == "inout"};
  }
}

bool Case::has(const std::string& name) const {
  return buffers_.count(name) != 0 || numbers_.count(name) != 0;
}

std::string Case::word(const std::string& name) const {
  const auto found = words_.find(name);
  if (found == words_.end()) stop("the case has no word '" + name + "'");
  return found->second;
}

double Case::number(const std::string& name) const {
  const auto found = numbers_.find(name);
  if (found == numbers_.end()) stop("the case has no number '" + name + "'");
  return found->second;
}

double Case::number(const std::string& name, double otherwise) const {
  const auto found = numbers_.find(name);
  return found == numbers_.end() ? otherwise : found->second;
}

saltire::cuda::Device Case::device() const {
  saltire::cuda::Device d;
  d.sm = static_cast<int>(number("sm", 90));
  d.multiprocessors = static_cast<int>(number("multiprocessors", 132));
  d.shared_bytes = static_cast<int>(number("shared_bytes", 227 * 1024));
  return d;
}

void Case::tell(const std::string& name, const std::string& text) {
  texts_[name] = text;
}

void Case::finish() {
  for (const auto& [name, buffer] : buffers_) {
    if (!buffer.back) continue;
    const size_t unwritten = count_unwritten(buffer.data, buffer.bytes);
    if (unwritten != 0) {
      stop("'" + name + "' has " + std::to_string(unwritten) + " bytes that nobody wrote");
    }
    std::cout << "out " << name << " " << buffer.bytes << "\n";
    std::cout.write(static_cast<const char*>(buffer.data),
                    static_cast<std::streamsize>(buffer.bytes));
  }
  for (const auto& [name, text] : texts_) {
    std::cout << "text " << name << " " << text.size() << "\n" << text;
  }
  std::cout.flush();
}

int run_case(void (*body)(Case&)) {
  try {
    Case one;
    body(one);
    one.finish();
    return 0;
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 4;
  }
}

}  // namespace emulator
