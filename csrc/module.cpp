// The Python module simplclip._C: importing it registers the CPU kernels; its functions describe the build and the CPU.
#include <Python.h>

#include <exception>

#include "cpu/instruction_set.h"

namespace {

PyObject* cpu_isa(PyObject*, PyObject*) {
  try {
    return PyUnicode_FromString(simplclip::instruction_set().name);
  } catch (const std::exception& e) {
    PyErr_SetString(PyExc_ValueError, e.what());
    return nullptr;
  }
}

PyObject* has_native_bf16(PyObject*, PyObject*) { return PyBool_FromLong(simplclip::has_native_bf16()); }

#if defined(__clang__)
constexpr const char* kCompiler = __VERSION__;
#else
constexpr const char* kCompiler = "gcc " __VERSION__;
#endif

PyObject* compiler(PyObject*, PyObject*) { return PyUnicode_FromString(kCompiler); }

PyMethodDef methods[] = {
    {"cpu_isa", cpu_isa, METH_NOARGS, "Name of the instruction set whose kernels run."},
    {"has_native_bf16", has_native_bf16, METH_NOARGS, "Whether the CPU multiplies bfloat16 matrices in hardware."},
    {"compiler", compiler, METH_NOARGS, "Version of the compiler that built this module."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
