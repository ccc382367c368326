// The library as a Python module of the stable ABI, for a call that must not cost 50 us.
//
// An operator that runs once a token is cold each time: its arguments go through code and tables
// that the model has pushed out of the caches. A steered site is made by an operator, once, and
// passes numbers to a function here at every token.
#if __has_include(<Python.h>)
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <exception>

#include "cpu/steer_site.h"

namespace fastsae {
namespace {

constexpr const char* kSite = "fastsae._cpu.site";

template <class T>
T* pointer(long long address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

void drop_site(PyObject* capsule) {
  delete static_cast<SteerSite*>(PyCapsule_GetPointer(capsule, kSite));
}

// The site that `fastsae::_steer_site` made, freed when this object of it is, after a call that
// still runs.
PyObject* owned(PyObject*, PyObject* handle) {
  auto* site = pointer<SteerSite>(PyLong_AsLongLong(handle));
  if (PyErr_Occurred()) return nullptr;
  PyObject* capsule = PyCapsule_New(site, kSite, drop_site);
  if (!capsule) delete site;
  return capsule;
}

PyObject* steer(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (n != 5) {
    PyErr_SetString(PyExc_TypeError, "steer(site, x, mask, tokens, out)");
    return nullptr;
  }
  const auto* site = static_cast<SteerSite*>(PyCapsule_GetPointer(args[0], kSite));
  const auto* x = pointer<void>(PyLong_AsLongLong(args[1]));
  const auto* mask = pointer<bool>(PyLong_AsLongLong(args[2]));
  const int64_t tokens = PyLong_AsLongLong(args[3]);
  auto* out = pointer<void>(PyLong_AsLongLong(args[4]));
  if (PyErr_Occurred()) return nullptr;
  bool done = false;
  std::exception_ptr error;
  Py_BEGIN_ALLOW_THREADS;
  try {
    done = steer_site(*site, x, mask, tokens, out);
  } catch (...) {
    error = std::current_exception();
  }
  Py_END_ALLOW_THREADS;
  try {
    if (error) std::rethrow_exception(error);
  } catch (const std::exception& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what());
    return nullptr;
  }
  return PyBool_FromLong(done);
}

PyMethodDef methods[] = {
    {"owned", owned, METH_O, nullptr},
    {"steer", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(steer)), METH_FASTCALL,
     nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace fastsae

PyMODINIT_FUNC PyInit__cpu() { return PyModule_Create(&fastsae::module); }
#endif
