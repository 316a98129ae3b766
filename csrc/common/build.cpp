#include "common/build.h"

#include <sstream>

// Read from the file by fastseq/backends/library.py before anything of it is loaded: this is our library, in this version.
extern "C" __attribute__((visibility("default"), used)) const char fastseq_library_mark[] =
    "fastseq-native-library " FASTSEQ_VERSION;

namespace fastseq {

std::string version() {
  return FASTSEQ_VERSION;
}

std::vector<std::string> architectures() {
  std::istringstream words(FASTSEQ_CPU_LEVELS " " FASTSEQ_CUDA_TARGETS);
  std::vector<std::string> result;
  for (std::string word; words >> word;) {
    result.push_back(word);
  }
  return result;
}

} // namespace fastseq
