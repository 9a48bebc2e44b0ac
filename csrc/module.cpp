// The Python module simplclip._C: importing it registers the CPU kernels; its functions describe the build and the CPU.
#include <Python.h>

#include <exception>

#include "cpu/instruction_set.h"
#include "sources.h"  // written by setup.py

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

PyObject* why_no_cuda(PyObject*, PyObject*) { return PyUnicode_FromString(SIMPLCLIP_NO_CUDA); }

PyMethodDef methods[] = {
    {"cpu_isa", cpu_isa, METH_NOARGS, "Name of the instruction set whose kernels run."},
    {"has_native_bf16", has_native_bf16, METH_NOARGS, "Whether the CPU multiplies bfloat16 matrices in hardware."},
    {"compiler", compiler, METH_NOARGS, "Version of the compiler that built this module."},
    {"why_no_cuda", why_no_cuda, METH_NOARGS, "Why simplclip._C_cuda was not built with this module; empty if it was."},
    {nullptr, nullptr, 0, nullptr},
};

// The docstring is the digest of the sources: simplclip/ops/extension.py reads it from the file, before it loads the module.
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", SIMPLCLIP_SOURCES, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
