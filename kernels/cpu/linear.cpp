// Linear layers of a few rows on a CPU, over weights in panels: packed[panel][input][W outputs], W two vectors.
//
// x [R, I], weight [O, I] -> [R, O]. A panel is read once for up to MAX_ROWS rows, in the order in which it lies in
// memory. Every output is one chain of fused multiply-adds in the order of the inputs, so a row's result depends
// neither on the other rows nor on the number of threads.

namespace {

constexpr int64_t W = 2 * S;
constexpr int MAX_ROWS = S >= 16 ? 8 : 5;  // 16 of 32 registers, or 10 of 16
constexpr int64_t DEPTH = 1024;            // inputs of a panel that stay in the L2 cache for the next rows: 128 KB
constexpr int64_t LEAST_WORK = 50'000;     // fewer multiplications are not worth waking another thread for

struct Layer {
  const float* x;
  const float* packed;
  const float* bias;
  float* out;
  int64_t rows, inputs, outputs;
};

// Inputs begin ... end - 1 of a panel, for ROWS rows; a panel that is wider than what is left of the output goes through `room`.
template <int ROWS>
void multiply(const Layer& l, int64_t row, int64_t panel, int64_t begin, int64_t end) {
  const int64_t first = panel * W, columns = std::min(W, l.outputs - first);
  float* out = l.out + row * l.outputs + first;
  float room[ROWS * W];
  float* c = columns == W ? out : room;
  const int64_t ldc = columns == W ? l.outputs : W;
  for (int r = 0; r < ROWS; ++r) {
    const float* from = begin ? out + r * l.outputs : l.bias ? l.bias + first : nullptr;
    if (!from) std::memset(c + r * ldc, 0, sizeof(float) * columns);
    else if (from != c + r * ldc) std::memcpy(c + r * ldc, from, sizeof(float) * columns);
  }
  const float* weight = l.packed + (panel * l.inputs + begin) * W;
  multiply_block<ROWS, 2>(l.x + row * l.inputs + begin, l.inputs, [=](int64_t i) { return weight + i * W; }, end - begin, c, ldc);
  for (int r = 0; c == room && r < ROWS; ++r) std::memcpy(out + r * l.outputs, room + r * W, sizeof(float) * columns);
}

template <int ROWS = MAX_ROWS>
void multiply_some(const Layer& l, int64_t rows, int64_t row, int64_t panel, int64_t begin, int64_t end) {
  if (rows == ROWS) return multiply<ROWS>(l, row, panel, begin, end);
  if constexpr (ROWS > 1) multiply_some<ROWS - 1>(l, rows, row, panel, begin, end);
}

Tensor panel_linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias) {
  const Tensor dense = x.is_contiguous() ? x : torch::stable::contiguous(x);
  const Strided from(dense), weight(packed), add(bias);
  const int64_t dims = x.dim();
  int64_t sizes[8];
  std::copy(from.sizes, from.sizes + dims - 1, sizes);
  sizes[dims - 1] = weight.sizes[0];
  const Tensor out = empty(dims, sizes, aoti_torch_dtype_float32());
  Layer l{static_cast<const float*>(from.data), static_cast<const float*>(weight.data), static_cast<const float*>(add.data),
          static_cast<float*>(out.data_ptr()), 1, weight.sizes[1], weight.sizes[0]};
  for (int64_t d = 0; d < dims - 1; ++d) l.rows *= sizes[d];
  const auto work = [&](int64_t panel, int64_t stop) {
    for (; panel < stop; ++panel)
      for (int64_t begin = 0; begin < l.inputs; begin += DEPTH)
        for (int64_t row = 0; row < l.rows; row += MAX_ROWS)
          multiply_some(l, std::min<int64_t>(MAX_ROWS, l.rows - row), row, panel, begin, std::min(begin + DEPTH, l.inputs));
  };
  const int64_t panels = (l.outputs + W - 1) / W;
  if (l.rows * l.inputs * l.outputs < LEAST_WORK) work(0, panels);
  else torch::stable::parallel_for(0, panels, 1, work);
  return out;
}

// weight [O, I] -> a tensor of the same shape whose memory holds the panels; the last one is filled up with zeros.
Tensor pack_linear(const Tensor& weight) {
  const Strided from(weight);
  const int64_t outputs = from.sizes[0], inputs = from.sizes[1], panels = (outputs + W - 1) / W;
  const int64_t whole[] = {panels * W, inputs}, dense[] = {inputs, 1};
  const Tensor room = empty(2, whole, aoti_torch_dtype_float32());
  auto* to = static_cast<float*>(room.data_ptr());
  for (int64_t panel = 0; panel < panels; ++panel)
    for (int64_t i = 0; i < inputs; ++i)
      for (int64_t o = panel * W; o < (panel + 1) * W; ++o)
        *to++ = o < outputs ? static_cast<const float*>(from.data)[o * from.strides[0] + i * from.strides[1]] : 0.0f;
  AtenTensorHandle view;
  aoti_torch__reinterpret_tensor(room.get(), 2, from.sizes, dense, 0, &view);
  return Tensor(view);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(autospec_cpu, CPU, library) {
  library.impl("panel_linear", TORCH_BOX(&panel_linear));
  library.impl("pack_linear", TORCH_BOX(&pack_linear));
}
