#include "cpu_features.h"

#ifdef BMC_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace bmc {

#ifdef BMC_X86
namespace {

struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);  // zeros where unknown
  return r;
}

unsigned long long enabled_state() {
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<unsigned long long>(high) << 32) | low;
}

bool bit(unsigned word, int index) { return (word >> index) & 1u; }

// Linux saves the tile registers only of processes that asked for them.
bool tiles_permitted() {
#ifdef __linux__
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

std::vector<const KernelTable*> usable_kernels() {
  const Registers base = cpuid(1, 0), extended = cpuid(7, 0), more = cpuid(7, 1);
  const bool osxsave = bit(base.ecx, 27);
  const unsigned long long state = osxsave ? enabled_state() : 0;
  const bool ymm = (state & 0x06) == 0x06;  // XMM and YMM
  const bool zmm = (state & 0xe6) == 0xe6;  // and opmask, upper ZMM, ZMM16-31
  const bool avx2 = ymm && bit(extended.ebx, 5) && bit(base.ecx, 12) && bit(base.ecx, 29);
  const bool avx512 = avx2 && zmm && bit(extended.ebx, 16) && bit(extended.ebx, 17) &&
                      bit(extended.ebx, 30) && bit(extended.ebx, 31);  // F, DQ, BW, VL
  const bool bf16 = avx512 && bit(more.eax, 5);
  const bool tile_state = (state & 0x60000) == 0x60000;  // tile configuration and data
  const bool amx =
      bf16 && tile_state && bit(extended.edx, 22) && bit(extended.edx, 24) && tiles_permitted();
  std::vector<const KernelTable*> found;
  if (amx) found.push_back(&kernels_amx_bf16());
  if (bf16) found.push_back(&kernels_avx512_bf16());
  if (avx512) found.push_back(&kernels_avx512());
  if (avx2) found.push_back(&kernels_avx2());
  found.push_back(&kernels_portable());
  return found;
}
#else
std::vector<const KernelTable*> usable_kernels() { return {&kernels_portable()}; }
#endif

}  // namespace bmc
