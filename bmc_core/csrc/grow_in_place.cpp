#include "grow_in_place.h"

#include <algorithm>
#include <cstring>
#include <memory>

namespace bmc {

namespace {

constexpr int64_t kShare = 512 << 10;  // bytes of a thread in the buffer: stays in its L2 cache

// Bytes [begin, end) of all valid bytes, counted through the parts, from or to a flat buffer.
template <class Move>
void for_pieces(char* base, int64_t valid, int64_t stride, int64_t begin, int64_t end, Move move) {
  while (begin < end) {
    const int64_t offset = begin % valid;
    const int64_t count = std::min(end - begin, valid - offset);
    move(base + begin / valid * stride + offset, count);
    begin += count;
  }
}

}  // namespace

void grow_in_place(char* base, int64_t parts, int64_t valid, int64_t old_stride, int64_t new_stride,
                   int num_threads) {
  const int64_t total = parts * valid;
  if (total == 0 || old_stride == new_stride) return;
  // 1 or all, never as many as there are shares: libgomp ends the threads that a smaller team
  // leaves over, and torch's next operation starts them again, at every growth of every layer.
  const int threads = total < 2 * kShare ? 1 : num_threads;
  const int64_t step = std::min<int64_t>(threads, (total + kShare - 1) / kShare) * kShare;
  const std::unique_ptr<char[]> buffer(new char[step]);
  // From the last byte down: no byte goes below where it was, so what is written was read before.
#pragma omp parallel num_threads(threads) if (threads > 1)
  for (int64_t end = total; end > 0; end -= step) {
    const int64_t begin = std::max<int64_t>(0, end - step);
#pragma omp for schedule(static)
    for (int64_t first = begin; first < end; first += kShare) {
      char* to = buffer.get() + (first - begin);
      for_pieces(base, valid, old_stride, first, std::min(end, first + kShare),
                 [&](const char* part, int64_t count) {
                   memcpy(to, part, count);
                   to += count;
                 });
    }
#pragma omp for schedule(static)
    for (int64_t first = begin; first < end; first += kShare) {
      const char* from = buffer.get() + (first - begin);
      for_pieces(base, valid, new_stride, first, std::min(end, first + kShare),
                 [&](char* part, int64_t count) {
                   memcpy(part, from, count);
                   from += count;
                 });
    }
  }
}

}  // namespace bmc
