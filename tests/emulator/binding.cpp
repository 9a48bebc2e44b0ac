#include "binding.h"

#include <pybind11/pybind11.h>

namespace py = pybind11;
using namespace simplclip::emulator;

namespace {

Argument convert(py::handle value) {
  if (py::isinstance<py::float_>(value)) return {0, value.cast<double>(), true};
  int64_t integer = 0;
  if (py::isinstance<py::str>(value)) {
    integer = reinterpret_cast<int64_t>(PyUnicode_AsUTF8(value.ptr()));
  } else if (py::hasattr(value, "data_ptr")) {  // torch.Tensor
    integer = value.attr("data_ptr")().cast<int64_t>();
  } else if (py::hasattr(value, "ctypes")) {  // numpy.ndarray
    integer = value.attr("ctypes").attr("data").cast<int64_t>();
  } else if (!value.is_none()) {
    integer = value.cast<int64_t>();
  }
  return {integer, static_cast<double>(integer), false};
}

}  // namespace

PYBIND11_MODULE(emulated, m) {
  for (const Function& function : functions()) {
    m.def(function.name, [&function](py::args values) -> py::object {
      if (values.size() != function.parameters) {
        throw py::type_error(std::string(function.name) + ": expected " + std::to_string(function.parameters) +
                             " arguments, got " + std::to_string(values.size()));
      }
      std::vector<Argument> arguments;
      for (py::handle value : values) arguments.push_back(convert(value));
      const int64_t result = function.call(arguments.data());
      return function.returns ? py::object(py::int_(result)) : py::none();
    });
  }
}
