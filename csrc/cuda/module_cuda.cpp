// The Python module simplclip._C_cuda, separate from _C so that one wheel also loads with a torch without CUDA.
#include <Python.h>

#include "attention/plan.h"
#include "sources.h"  // written by setup.py

namespace {

PyObject* shaped_attention_why_not(PyObject*, PyObject* args) {
  int length = 0, width = 0, wide = 0;
  if (!PyArg_ParseTuple(args, "iip", &length, &width, &wide)) return nullptr;
  if (const char* reason = simplclip::why_no_shaped_plan(length, width, wide)) return PyUnicode_FromString(reason);
  Py_RETURN_NONE;
}

PyObject* shaped_attention_plan(PyObject*, PyObject* args) {
  int length = 0, width = 0, wide = 0, backward = 0;
  if (!PyArg_ParseTuple(args, "iipp", &length, &width, &wide, &backward)) return nullptr;
  if (const char* reason = simplclip::why_no_shaped_plan(length, width, wide)) {
    PyErr_SetString(PyExc_ValueError, reason);
    return nullptr;
  }
  const simplclip::ShapedPlan plan = backward ? simplclip::plan_shaped_backward(length, width, wide)
                                              : simplclip::plan_shaped_forward(length, width, wide);
  return Py_BuildValue("{s:s,s:i,s:i,s:i,s:i,s:i}", "kernel", plan.kernel, "threads", plan.threads, "shared", plan.shared,
                       "slice", plan.slice, "products", plan.products, "resident", plan.resident);
}

PyObject* architectures(PyObject*, PyObject*) { return PyUnicode_FromString(SIMPLCLIP_ARCHITECTURES); }

PyMethodDef methods[] = {
    {"architectures", architectures, METH_NOARGS, "The architectures that this module was compiled for."},
    {"shaped_attention_why_not", shaped_attention_why_not, METH_VARARGS,
     "shaped_attention_why_not(tokens, width, is_float32) -> why its kernels do not support such heads, or None."},
    {"shaped_attention_plan", shaped_attention_plan, METH_VARARGS,
     "shaped_attention_plan(tokens, width, is_float32, is_backward) -> dict of the launch, see ShapedPlan."},
    {nullptr, nullptr, 0, nullptr},
};

// The docstring is the digest of the sources: simplclip/ops/extension.py reads it from the file, before it loads the module.
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C_cuda", SIMPLCLIP_SOURCES_CUDA, -1, methods,
                          nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C_cuda() { return PyModule_Create(&definition); }
