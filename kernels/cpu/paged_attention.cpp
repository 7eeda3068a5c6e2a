// Attention over pages on a CPU: reads the committed rows in place, and no page past them.
//
// q [B, N, Hq, D]; k_pages [num_pages, P, H, D]; v_pages [num_pages, P, H, Dv]; tree_mask [B, nodes, words] int32.
// The queries are the last N of the nodes; node j lies in slot kv_len + j. G query heads share one K/V head.
//
// A tile is up to 64 rows of one K/V head; row r is query r / G and head h G + r % G. It walks over the slots in
// blocks of 64 with an online softmax. Blocks begin at multiples of 64 and a row sums in the order of the slots, so a
// row's result depends on what it sees, never on the tile, the other rows or the number of threads.

namespace {

constexpr int64_t T = 64;         // slots of a block; a multiple of S
constexpr int64_t MAX_ROWS = 64;  // rows of a tile
constexpr int WIDE = S >= 16 ? 4 : 2;  // vectors that a micro-kernel keeps per row: 16 of 32 registers, or 8 of 16
constexpr float INF = std::numeric_limits<float>::infinity();

struct Problem {
  Strided q, k_pages, v_pages, page_table, kv_lens, q_lens, tree_mask;
  const float* sinks;
  const float* slopes;
  void* out;
  int64_t batch, q_len, q_heads, D, page_size, heads, Dv, group, capacity, nodes, words;
  int64_t window, chunk;
  float scale, softcap;

  int64_t committed(int64_t b) const { return static_cast<const int32_t*>(kv_lens.data)[b * kv_lens.strides[0]]; }
  int64_t valid(int64_t b) const {
    return q_lens ? std::min<int64_t>(static_cast<const int32_t*>(q_lens.data)[b * q_lens.strides[0]], q_len) : q_len;
  }
  int64_t page(int64_t b, int64_t logical) const {
    return static_cast<const int32_t*>(page_table.data)[b * page_table.strides[0] + logical * page_table.strides[1]];
  }
  uint32_t word(int64_t b, int64_t node, int64_t w) const {
    const auto* s = tree_mask.strides;
    return static_cast<const uint32_t*>(tree_mask.data)[b * s[0] + node * s[1] + w * s[2]];
  }
  bool links(int64_t b, int64_t node, int64_t other) const {
    return tree_mask ? (word(b, node, other >> 5) >> (other & 31)) & 1 : other <= node;
  }
  int64_t depth(int64_t b, int64_t node) const {
    if (!tree_mask) return node;
    int64_t count = -1;
    for (int64_t w = 0; w < words; ++w) count += __builtin_popcount(word(b, node, w));
    return count;
  }
};

template <typename From>
const float* as_floats(const From* from, float* to, int64_t count) {
  if constexpr (std::is_same_v<From, float>) return from;
  at::vec::convert<From, float>(from, to, count);
  return to;
}

template <int VECS, typename RowOf>
inline void multiply_columns(int64_t rows, const float* a, int64_t lda, RowOf row, int64_t depth, float* c, int64_t ldc) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) multiply_block<4, VECS>(a + r * lda, lda, row, depth, c + r * ldc, ldc);
  a += r * lda;
  c += r * ldc;
  if (rows - r == 3) multiply_block<3, VECS>(a, lda, row, depth, c, ldc);
  if (rows - r == 2) multiply_block<2, VECS>(a, lda, row, depth, c, ldc);
  if (rows - r == 1) multiply_block<1, VECS>(a, lda, row, depth, c, ldc);
}

// The same for any number of rows, and a width that is a multiple of S.
template <typename RowOf>
void multiply(int64_t rows, int64_t width, const float* a, int64_t lda, RowOf row, int64_t depth, float* c, int64_t ldc) {
  int64_t at = 0;
  const auto shifted = [&](int64_t k) { return row(k) + at; };
  for (; at + WIDE * S <= width; at += WIDE * S) multiply_columns<WIDE>(rows, a, lda, shifted, depth, c + at, ldc);
  for (; at + 2 * S <= width; at += 2 * S) multiply_columns<2>(rows, a, lda, shifted, depth, c + at, ldc);
  for (; at < width; at += S) multiply_columns<1>(rows, a, lda, shifted, depth, c + at, ldc);
}

inline float reduce(const Vec& vector, bool is_max) {
  float lanes[S];
  vector.store(lanes);
  float result = lanes[0];
  for (int64_t i = 1; i < S; ++i) result = is_max ? std::max(result, lanes[i]) : result + lanes[i];
  return result;
}

int64_t round_up(int64_t value) { return (value + S - 1) / S * S; }

// The memory of a tile; one per thread.
struct Scratch {
  std::vector<float> memory;
  float *q, *keys, *scores, *values, *acc, *row, *bias, *top, *sum;

  void reserve(int64_t rows, int64_t D, int64_t Dv, int64_t nodes) {
    const int64_t wide = round_up(Dv), key = round_up(D);
    const int64_t parts[] = {rows * D, key * T, rows * T, T * wide, rows * wide, std::max(S * key, T), nodes * T, rows, rows};
    int64_t total = 0;
    for (int64_t part : parts) total += part;
    if (static_cast<int64_t>(memory.size()) < total) memory.resize(total);
    float* next = memory.data();
    float** places[] = {&q, &keys, &scores, &values, &acc, &row, &bias, &top, &sum};
    for (int i = 0; i < 9; next += parts[i], ++i) *places[i] = next;
  }
};

template <typename Element>
struct Tile {
  const Problem& p;
  Scratch& s;
  const int64_t b, h, first, rows;  // rows first ... first + rows - 1 of K/V head h
  const int64_t wide = round_up(p.Dv);
  const int64_t kv_len = p.committed(b), valid = p.valid(b), first_node = p.nodes - p.q_len;
  const Element* key_rows[T];
  const Element* value_rows[T];

  int64_t query(int64_t r) const { return (first + r) / p.group; }
  int64_t head(int64_t r) const { return h * p.group + (first + r) % p.group; }

  void run() {
    s.reserve(rows, p.D, p.Dv, rows / p.group + 2);
    const int64_t live = std::clamp<int64_t>(valid * p.group - first, 0, rows);
    const int64_t last = live ? first_node + query(live - 1) : -1;  // ancestors of a node have lower numbers
    const int64_t end = live ? std::min(kv_len + last + 1, p.capacity) : 0;
    load_queries(live);
    int64_t lowest = 0;
    if (live && (p.window || p.chunk)) {
      lowest = end;
      for (int64_t i = query(0); i <= query(live - 1); ++i) {
        const int64_t position = kv_len + p.depth(b, first_node + i);
        int64_t low = p.window ? position - p.window + 1 : 0;
        if (p.chunk) low = std::max(low, position / p.chunk * p.chunk);
        lowest = std::clamp<int64_t>(low, 0, lowest);
      }
    }
    for (int64_t at = lowest / T * T; at < end; at += T) block(at, std::min(T, end - at), live);
    store(live);
  }

  void load_queries(int64_t live) {
    const auto* strides = p.q.strides;
    for (int64_t r = 0; r < live; ++r) {
      const auto* from = static_cast<const Element*>(p.q.data) + b * strides[0] + query(r) * strides[1] + head(r) * strides[2];
      for (int64_t d = 0; d < p.D; ++d) s.q[r * p.D + d] = static_cast<float>(from[d * strides[3]]) * p.scale;
      s.top[r] = p.sinks ? p.sinks[head(r)] : -INF;
      s.sum[r] = p.sinks ? 1.0f : 0.0f;
    }
    std::memset(s.acc, 0, sizeof(float) * live * wide);
  }

  // Slots at ... at + count - 1.
  void block(int64_t at, int64_t count, int64_t live) {
    find_rows(at, count);
    load_keys(at, count);
    std::memset(s.scores, 0, sizeof(float) * live * T);
    multiply(live, round_up(count), s.q, p.D, [&](int64_t d) { return s.keys + d * T; }, p.D, s.scores, T);
    const bool is_plain = !p.window && !p.chunk && !p.slopes && count % S == 0 &&
        at + count <= kv_len + (p.tree_mask ? 0 : first_node + query(0) + 1);
    if (!is_plain) fill_bias(at, count, live);
    for (int64_t r = 0; r < live; ++r) softmax(r, round_up(count), is_plain ? nullptr : s.bias + (query(r) - query(0)) * T);
    if constexpr (std::is_same_v<Element, float>) {
      if (p.Dv % S == 0) {
        multiply(live, wide, s.scores, T, [&](int64_t t) { return value_rows[t]; }, count, s.acc, wide);
        return;
      }
    }
    for (int64_t t = 0; t < count; ++t) {
      float* to = s.values + t * wide;
      if constexpr (std::is_same_v<Element, float>) std::memcpy(to, value_rows[t], sizeof(float) * p.Dv);
      else at::vec::convert<Element, float>(value_rows[t], to, p.Dv);
      std::fill(to + p.Dv, to + wide, 0.0f);
    }
    multiply(live, wide, s.scores, T, [&](int64_t t) { return s.values + t * wide; }, count, s.acc, wide);
  }

  void find_rows(int64_t at, int64_t count) {
    const auto *k = p.k_pages.strides, *v = p.v_pages.strides;
    for (int64_t t = 0; t < count;) {
      const int64_t page = p.page(b, (at + t) / p.page_size);
      for (int64_t offset = (at + t) % p.page_size; offset < p.page_size && t < count; ++offset, ++t) {
        key_rows[t] = static_cast<const Element*>(p.k_pages.data) + page * k[0] + offset * k[1] + h * k[2];
        value_rows[t] = static_cast<const Element*>(p.v_pages.data) + page * v[0] + offset * v[1] + h * v[2];
      }
    }
  }

  // keys [D, T]: S slots at a time are copied into `row` unless one page holds them all, and transposed.
  void load_keys(int64_t at, int64_t count) {
    const int64_t stride = p.k_pages.strides[1], key = round_up(p.D);
    for (int64_t t = 0; t < count; t += S) {
      const int64_t slots = std::min(S, count - t);
      const float* from = s.row;
      int64_t ld = key;
      if (std::is_same_v<Element, float> && slots == S && (at + t) % p.page_size + S <= p.page_size) {
        from = reinterpret_cast<const float*>(key_rows[t]);
        ld = stride;
      } else {
        for (int64_t i = 0; i < slots; ++i) {
          const float* row = as_floats(key_rows[t + i], s.row + i * key, p.D);
          if (row != s.row + i * key) std::memcpy(s.row + i * key, row, sizeof(float) * p.D);
        }
        for (int64_t i = slots; i < S; ++i) std::memset(s.row + i * key, 0, sizeof(float) * p.D);
      }
      for (int64_t d = 0; d < p.D; d += S) {
        at::vec::transpose_mxn<float>(from + d, ld, s.keys + d * T + t, T, S, std::min(S, p.D - d));
      }
    }
  }

  // bias [queries, T]: 0 where a query of the tile sees a slot, or its distance for the slopes; -inf elsewhere.
  void fill_bias(int64_t at, int64_t count, int64_t live) {
    for (int64_t i = query(0); i <= query(live - 1); ++i) {
      float* to = s.bias + (i - query(0)) * T;
      const int64_t node = first_node + i;
      const int64_t here = kv_len + p.depth(b, node);
      const bool is_measured = p.window || p.chunk || p.slopes;
      for (int64_t t = 0; t < T; ++t) {
        const int64_t slot = at + t, other = slot - kv_len;
        bool is_seen = t < count && (other < 0 || (other <= node && p.links(b, node, other)));
        to[t] = 0.0f;
        if (is_seen && is_measured) {
          const int64_t position = other < 0 ? slot : kv_len + p.depth(b, other);
          is_seen = position <= here && (!p.window || position > here - p.window) &&
              (!p.chunk || position / p.chunk == here / p.chunk);
          if (p.slopes) to[t] = static_cast<float>(position - here);
        }
        if (!is_seen) to[t] = -INF;
      }
    }
  }

  // Scores of a row become weights; `bias` is null where the row sees the whole block.
  void softmax(int64_t r, int64_t width, const float* bias) {
    float* scores = s.scores + r * T;
    Vec best(-INF);
    for (int64_t t = 0; t < width; t += S) {
      Vec x = Vec::loadu(scores + t);
      if (p.softcap != 0.0f) x = (x / Vec(p.softcap)).tanh() * Vec(p.softcap);
      if (bias) {
        const Vec add = Vec::loadu(bias + t);
        x = p.slopes ? at::vec::fmadd(add, Vec(p.slopes[head(r)]), x) : x;
        x = Vec::blendv(x, Vec(-INF), add == Vec(-INF));
      }
      best = at::vec::maximum(best, x);
      x.store(scores + t);
    }
    const float top = std::max(s.top[r], reduce(best, true));
    if (top == -INF) {
      std::memset(scores, 0, sizeof(float) * width);
      return;
    }
    if (top != s.top[r]) {
      const float keep = std::exp(s.top[r] - top);
      s.sum[r] *= keep;
      for (int64_t d = 0; d < wide; d += S) (Vec::loadu(s.acc + r * wide + d) * Vec(keep)).store(s.acc + r * wide + d);
      s.top[r] = top;
    }
    Vec sum(0.0f);
    for (int64_t t = 0; t < width; t += S) {
      const Vec weight = (Vec::loadu(scores + t) - Vec(top)).exp();
      sum = sum + weight;
      weight.store(scores + t);
    }
    s.sum[r] += reduce(sum, false);
  }

  // Rows past q_lens, and rows that see nothing, become 0.
  void store(int64_t live) {
    for (int64_t r = 0; r < rows; ++r) {
      auto* to = static_cast<Element*>(p.out) + ((b * p.q_len + query(r)) * p.q_heads + head(r)) * p.Dv;
      if (r >= live || s.sum[r] == 0.0f) {
        std::fill(to, to + p.Dv, Element(0.0f));
        continue;
      }
      const float* from = s.acc + r * wide;
      for (int64_t d = 0; d < p.Dv; ++d) to[d] = static_cast<Element>(from[d] / s.sum[r]);
    }
  }
};

// Fewer multiplications than this are not worth waking another thread for.
constexpr int64_t LEAST_WORK = 200'000;

template <typename Element>
void attend(const Problem& p) {
  const int64_t all_rows = p.q_len * p.group;
  int64_t work = 0;
  for (int64_t b = 0; b < p.batch; ++b) work += (p.committed(b) + p.nodes) * p.valid(b) * p.q_heads * (p.D + p.Dv);
  const int64_t threads = work < LEAST_WORK ? 1 : torch::stable::get_num_threads();
  const int64_t wanted = (threads + p.batch * p.heads - 1) / (p.batch * p.heads);
  const int64_t tile = std::max<int64_t>(1, std::min(MAX_ROWS, (all_rows + wanted - 1) / wanted));
  const int64_t tiles = (all_rows + tile - 1) / tile, items = p.batch * p.heads * tiles;
  const auto work_on = [&](int64_t begin, int64_t stop) {
    static thread_local Scratch scratch;
    for (int64_t i = begin; i < stop; ++i) {
      const int64_t first = i % tiles * tile;
      Tile<Element>{p, scratch, i / tiles / p.heads, i / tiles % p.heads, first, std::min(tile, all_rows - first)}.run();
    }
  };
  if (threads == 1) work_on(0, items);
  else torch::stable::parallel_for(0, items, 1, work_on);
}

Tensor paged_attention(
    const Tensor& q, const Tensor& k_pages, const Tensor& v_pages, const Tensor& page_table, const Tensor& kv_lens,
    const std::optional<Tensor>& q_lens, const std::optional<Tensor>& tree_mask, const std::optional<Tensor>& sinks,
    double scale, int64_t window, int64_t chunk, double softcap, const std::optional<Tensor>& alibi_slopes) {
  Problem p{Strided(q), Strided(k_pages), Strided(v_pages), Strided(page_table), Strided(kv_lens), Strided(q_lens), Strided(tree_mask)};
  p.batch = p.q.sizes[0], p.q_len = p.q.sizes[1], p.q_heads = p.q.sizes[2], p.D = p.q.sizes[3];
  p.page_size = p.k_pages.sizes[1], p.heads = p.k_pages.sizes[2], p.Dv = p.v_pages.sizes[3];
  p.group = p.q_heads / p.heads;
  p.capacity = p.page_table.sizes[1] * p.page_size;
  p.nodes = p.tree_mask ? p.tree_mask.sizes[1] : p.q_len;
  p.words = p.tree_mask ? p.tree_mask.sizes[2] : 0;
  p.window = window, p.chunk = chunk, p.scale = static_cast<float>(scale), p.softcap = static_cast<float>(softcap);

  std::vector<float> per_head(2 * p.q_heads);
  const auto floats = [&](const std::optional<Tensor>& tensor, float* to) -> const float* {
    if (!tensor) return nullptr;
    const Strided from(*tensor);
    for (int64_t i = 0; i < p.q_heads; ++i) {
      const int64_t place = i * from.strides[0];
      switch (tensor->scalar_type()) {
        case torch::headeronly::ScalarType::Float: to[i] = static_cast<const float*>(from.data)[place]; break;
        case torch::headeronly::ScalarType::BFloat16: to[i] = static_cast<const c10::BFloat16*>(from.data)[place]; break;
        case torch::headeronly::ScalarType::Half: to[i] = static_cast<const c10::Half*>(from.data)[place]; break;
        default: to[i] = static_cast<float>(static_cast<const double*>(from.data)[place]);
      }
    }
    return to;
  };
  p.sinks = floats(sinks, per_head.data());
  p.slopes = floats(alibi_slopes, per_head.data() + p.q_heads);

  const int64_t sizes[] = {p.batch, p.q_len, p.q_heads, p.Dv};
  int32_t dtype;
  aoti_torch_get_dtype(q.get(), &dtype);
  const Tensor out = empty(4, sizes, dtype);
  p.out = out.data_ptr();
  switch (q.scalar_type()) {
    case torch::headeronly::ScalarType::BFloat16: attend<c10::BFloat16>(p); break;
    case torch::headeronly::ScalarType::Half: attend<c10::Half>(p); break;
    default: attend<float>(p);
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(autospec_cpu, CPU, library) {
  library.impl("paged_attention", TORCH_BOX(&paged_attention));
}
