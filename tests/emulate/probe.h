// How a probe of the emulator is called from Python: launches, and hands back the message of what went wrong.
#pragma once
#include <string>

template <class F>
const char* probed(const F& launches) {
  static std::string message;
  message.clear();
  try {
    launches();
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

#define PROBE(name, ...) extern "C" EMULATE_API const char* name(__VA_ARGS__)
