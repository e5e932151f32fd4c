#include "tensor_view.h"

namespace py = pybind11;

namespace bmc {
namespace {

// DLPack 1.3 and later of the same major version (dlpack.h): DLTensor and DLPackExchangeAPI.
constexpr uint32_t kMajor = 1, kFirstMinor = 3;
constexpr int32_t kCpu = 1;

struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  ElementType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct ExchangeAPI {
  uint32_t major, minor;
  void* older;
  void *allocate, *managed_from_py_object, *managed_to_py_object;
  int (*dltensor_from_py_object)(void* py_object, void* dl_tensor);  // 0, or Python's error is set
  void* current_work_stream;
};

struct Names {
  PyObject* requires_grad = PyUnicode_InternFromString("requires_grad");
  PyObject* is_neg = PyUnicode_InternFromString("is_neg");
  PyObject* untyped_storage = PyUnicode_InternFromString("untyped_storage");
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* nbytes = PyUnicode_InternFromString("nbytes");
};

const Names& names() {
  static const Names interned;
  return interned;
}

// Null, with Python's error set, where there is no answer.
py::object result(py::handle object, PyObject* method) {
  return py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(object.ptr(), method));
}

bool number(const py::object& found, uintptr_t* number) {
  if (!found || !PyLong_Check(found.ptr())) return false;
  *number = PyLong_AsSize_t(found.ptr());
  return !PyErr_Occurred();
}

// What DLPack does not tell: the negative bit, gradients, and the storage.
bool holds_its_values(py::handle tensor, uintptr_t end) {
  const Names& name = names();
  const py::object gradients =
      py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor.ptr(), name.requires_grad));
  if (gradients.ptr() != Py_False || result(tensor, name.is_neg).ptr() != Py_False) return false;
  const py::object storage = result(tensor, name.untyped_storage);
  uintptr_t base, bytes;
  if (!storage || !number(result(storage, name.data_ptr), &base)) return false;
  // A freed tensor's own address is its offset.
  return base != 0 && number(result(storage, name.nbytes), &bytes) && end <= base + bytes;
}

bool lay_out(const DLTensor& tensor, TensorView* view) {
  __int128 elements = 1;
  for (int i = 0; i < tensor.ndim; ++i) {
    view->shape[i] = tensor.shape[i];
    view->strides[i] = tensor.strides[i];
    if (view->shape[i] <= 0 || view->strides[i] < 0) return false;
    elements += static_cast<__int128>(view->shape[i] - 1) * view->strides[i];
  }
  view->begin = reinterpret_cast<uintptr_t>(tensor.data) + tensor.byte_offset;
  const __int128 end = view->begin + elements * (tensor.dtype.bits / 8);
  view->end = static_cast<uintptr_t>(end);
  return end <= INTPTR_MAX;
}

}  // namespace

TensorViewer::TensorViewer() : tensor_class_(py::module_::import("torch").attr("Tensor")) {
  const py::object capsule = py::getattr(tensor_class_, "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return;
  const auto* api =
      static_cast<const ExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api->major == kMajor && api->minor >= kFirstMinor) describe_ = api->dltensor_from_py_object;
}

bool TensorViewer::view(py::handle tensor, int dims, TensorView* view, ElementType* type) const {
  if (describe_ == nullptr || !py::type::handle_of(tensor).is(tensor_class_)) return false;
  DLTensor found;
  const bool viewed = describe_(tensor.ptr(), &found) == 0 && found.ndim == dims &&
                      found.device_type == kCpu && found.strides != nullptr &&
                      lay_out(found, view) && holds_its_values(tensor, view->end);
  if (!viewed) {
    PyErr_Clear();  // sparse tensors and wrappers of transforms raise
    return false;
  }
  *type = found.dtype;
  return true;
}

}  // namespace bmc
