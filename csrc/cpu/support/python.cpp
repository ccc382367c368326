// The library as a Python module of the stable ABI, for a call that must not cost 50 us.
//
// An operator that runs once a token is cold each time: its arguments go through code and tables
// that the model has pushed out of the caches. A steered site passes numbers to a function instead.
#if __has_include(<Python.h>)
#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
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
  Py_XDECREF(static_cast<PyObject*>(PyCapsule_GetContext(capsule)));
}

PyObject* make_site(PyObject*, PyObject* args) {
  long long dtype, enc, dec, param, code, slots, S, O, D, B, norm;
  long long wanted, centre, w, bias, scale, codes, bounds, F, k, positive;
  double eps;
  PyObject* kept;  // whatever holds the memory that is pointed into
  if (!PyArg_ParseTuple(args, "LLLLLLLLLLLdLLLLLLLLLLO", &dtype, &enc, &dec, &param, &code, &slots,
                        &S, &O, &D, &B, &norm, &eps, &wanted, &centre, &w, &bias, &scale, &codes,
                        &bounds, &F, &k, &positive, &kept)) {
    return nullptr;
  }
  auto* site =
      new SteerSite{static_cast<ScalarType>(dtype),
                    pointer<void>(enc),
                    pointer<void>(dec),
                    pointer<void>(param),
                    pointer<int32_t>(code),
                    pointer<int32_t>(slots),
                    S,
                    O,
                    D,
                    B,
                    norm,
                    eps,
                    pointer<int32_t>(wanted),
                    pointer<void>(centre),
                    {pointer<void>(w), pointer<void>(bias), pointer<void>(scale),
                     pointer<int8_t>(codes), pointer<float>(bounds), D, F, k, positive != 0}};
  PyObject* capsule = PyCapsule_New(site, kSite, drop_site);
  if (!capsule) {
    delete site;
  } else if (!PyCapsule_SetContext(capsule, kept)) {
    Py_INCREF(kept);
  }
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
    {"make_site", make_site, METH_VARARGS, nullptr},
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
