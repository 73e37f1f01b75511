// Faults that the sanitizers must find, by name: proof that they look.
#include <climits>
#include <cstdlib>
#include <string>
#include <thread>

namespace {

int shared = 0;
int* volatile kept = nullptr;

void race() {
  std::thread other([] { ++shared; });
  ++shared;
  other.join();
}

}  // namespace

int main(int argc, char** argv) {
  const std::string fault = argc == 2 ? argv[1] : "";
  if (fault == "race") race();
  if (fault == "leak") {
    kept = new int(1);
    kept = nullptr;
  }
  if (fault == "use after free") {
    kept = new int(argc);
    int* const gone = kept;
    delete gone;
    return *kept;
  }
  if (fault == "overflow") {
    int volatile large = INT_MAX;
    large = large + argc;
  }
  return 0;
}
