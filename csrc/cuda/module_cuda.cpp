// The Python module simplclip._C_cuda, apart from _C so that one wheel also loads beside a torch without CUDA.
#include <Python.h>

#include "device.h"

namespace {

PyObject* device_limits(PyObject*, PyObject* args) {
  int device = 0;
  if (!PyArg_ParseTuple(args, "i", &device)) return nullptr;
  simplclip::DeviceLimits limits{};
  if (const char* error = simplclip::device_limits(device, &limits)) {
    PyErr_SetString(PyExc_RuntimeError, error);
    return nullptr;
  }
  return Py_BuildValue("{s:i,s:i,s:i,s:i,s:i,s:i,s:i}", "major", limits.major, "minor", limits.minor, "multiprocessors",
                       limits.multiprocessors, "shared_bytes_per_block", limits.shared_bytes_per_block,
                       "shared_bytes_per_multiprocessor", limits.shared_bytes_per_multiprocessor,
                       "registers_per_multiprocessor", limits.registers_per_multiprocessor, "binary_version",
                       limits.binary_version);
}

PyObject* architectures(PyObject*, PyObject*) { return PyUnicode_FromString(SIMPLCLIP_ARCHITECTURES); }

PyMethodDef methods[] = {
    {"device_limits", device_limits, METH_VARARGS, "device_limits(index) -> dict of what a kernel may use there."},
    {"architectures", architectures, METH_NOARGS, "The architectures that this module was compiled for."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C_cuda() { return PyModule_Create(&definition); }
