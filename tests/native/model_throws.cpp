#include <stdexcept>

#include "model_library.h"

void throw_standard(const char* what) {
  throw std::runtime_error(what != nullptr ? what : "thrown");
}
void throw_other() { throw 42; }
