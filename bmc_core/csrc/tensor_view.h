// What a torch tensor is, asked through DLPack's C exchange API, whose structures are fixed for a
// major version: no header of torch is needed, and one build fits every torch. Knows nothing of
// attention.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace bmc {

constexpr int kMostDims = 4;

// A tensor whose memory holds its values, all of them, and which carries no gradient.
struct TensorView {
  int64_t shape[kMostDims], strides[kMostDims];  // strides in elements
  uintptr_t begin, end;                          // addresses, gaps between its rows included

  bool apart_from(const TensorView& other) const {
    return end <= other.begin || other.end <= begin;
  }
};

// As DLPack names types.
struct ElementType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes = 1;

  bool operator==(const ElementType& o) const {
    return code == o.code && bits == o.bits && lanes == o.lanes;
  }
};

constexpr ElementType kInt64{0, 64}, kFloat32Element{2, 32};

class TensorViewer {
 public:
  // Of torch.Tensor. Where this torch has no exchange API of the known version, nothing is viewed.
  TensorViewer();

  // False for every tensor that needs a closer look: a subclass, another number of dimensions,
  // without elements, on another device, negated, with gradients, without memory of its own or with
  // less of it than its shape takes. Raises nothing.
  bool view(pybind11::handle tensor, int dims, TensorView* view, ElementType* type) const;

  // Also false for tensors of another type.
  bool view(pybind11::handle tensor, int dims, ElementType type, TensorView* view) const {
    ElementType found;
    return this->view(tensor, dims, view, &found) && found == type;
  }

 private:
  pybind11::object tensor_class_;
  int (*describe_)(void* py_object, void* dl_tensor) = nullptr;
};

}  // namespace bmc
