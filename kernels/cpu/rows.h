// What the C++ kernels share; put in front of each of them before it is compiled.

#include <ATen/cpu/vec/vec.h>
#include <c10/util/Unroll.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

namespace {

using torch::stable::Tensor;
using Vec = at::vec::Vectorized<float>;
constexpr int64_t S = Vec::size();

// A tensor's memory, sizes and strides; all null without a tensor.
struct Strided {
  void* data = nullptr;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;

  Strided() = default;
  explicit Strided(const Tensor& tensor) : data(tensor.data_ptr()) {
    int64_t *all_sizes, *all_strides;
    aoti_torch_get_sizes(tensor.get(), &all_sizes);
    aoti_torch_get_strides(tensor.get(), &all_strides);
    sizes = all_sizes;
    strides = all_strides;
  }
  explicit Strided(const std::optional<Tensor>& tensor) {
    if (tensor) *this = Strided(*tensor);
  }
  explicit operator bool() const { return data != nullptr; }
};

inline Tensor empty(int64_t dims, const int64_t* sizes, int32_t dtype) {
  int64_t strides[8], step = 1;
  for (int64_t d = dims - 1; d >= 0; --d) {
    strides[d] = step;
    step *= sizes[d];
  }
  AtenTensorHandle handle;
  aoti_torch_empty_strided(dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle);
  return Tensor(handle);
}

// c [ROWS, VECS * S] += a [ROWS, depth] @ rows [depth, VECS * S]; every element is one chain of fused multiply-adds.
template <int ROWS, int VECS, typename RowOf>
inline void multiply_block(const float* a, int64_t lda, RowOf row, int64_t depth, float* c, int64_t ldc) {
  const c10::ForcedUnroll<ROWS> each_row;  // so that the sums stay in registers
  const c10::ForcedUnroll<VECS> each_vector;
  Vec sum[ROWS][VECS];
  each_row([&](auto r) { each_vector([&](auto i) { sum[r][i] = Vec::loadu(c + r * ldc + i * S); }); });
  for (int64_t k = 0; k < depth; ++k) {
    const float* from = row(k);
    Vec right[VECS];
    each_vector([&](auto i) { right[i] = Vec::loadu(from + i * S); });
    each_row([&](auto r) {
      const Vec left(a[r * lda + k]);
      each_vector([&](auto i) { sum[r][i] = at::vec::fmadd(left, right[i], sum[r][i]); });
    });
  }
  each_row([&](auto r) { each_vector([&](auto i) { Vec(sum[r][i]).store(c + r * ldc + i * S); }); });
}

}  // namespace
