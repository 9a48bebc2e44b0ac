// Lets Python call a kernel's launchers: EMULATED(ldmatrix) adds the function `ldmatrix` of a file to its Python module.
// Parameters are pointers (Python passes a tensor, an array, a str, an address or None), integers, bool and floats; the
// result is void or an integer. Only binding.cpp includes pybind11, which takes longer to compile than most kernels.
#pragma once

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace simplclip::emulator {

struct Argument {
  int64_t integer;  // or an address
  double real;
  bool is_real;
};

struct Function {
  const char* name;
  size_t parameters;
  bool returns;
  std::function<int64_t(const Argument*)> call;
};

inline std::vector<Function>& functions() {
  static std::vector<Function> all;
  return all;
}

template <class P>
P as(const Argument& argument) {
  if constexpr (std::is_floating_point_v<P>) {
    return static_cast<P>(argument.real);
  } else {
    if (argument.is_real) throw std::invalid_argument("expected no float, got " + std::to_string(argument.real));
    if constexpr (std::is_pointer_v<P>) {
      return reinterpret_cast<P>(argument.integer);
    } else {
      return static_cast<P>(argument.integer);
    }
  }
}

template <class Result, class... P>
bool add_function(const char* name, Result (*function)(P...)) {
  auto call = [function]<size_t... I>(const Argument* arguments, std::index_sequence<I...>) -> int64_t {
    if constexpr (std::is_void_v<Result>) {
      function(as<P>(arguments[I])...);
      return 0;
    } else {
      return function(as<P>(arguments[I])...);
    }
  };
  functions().push_back({name, sizeof...(P), !std::is_void_v<Result>, [call](const Argument* arguments) {
                           return call(arguments, std::index_sequence_for<P...>{});
                         }});
  return true;
}

}  // namespace simplclip::emulator

#define EMULATED(FUNCTION) static const bool added_##FUNCTION = simplclip::emulator::add_function(#FUNCTION, FUNCTION)
