// SoundNet's layers on a CPU, for inference in float32. A plain C interface, without Python: kernels.py loads it.
//
// lanes.h holds the code, kernels.py what it computes and why; here it is compiled for each kind of processor, and
// the processor at hand gets the widest that it can run.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

#define INLINE static inline __attribute__((always_inline))

// code between BEGIN_TARGET and END_TARGET may use these instructions
#define PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#define BEGIN_TARGET(names) PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define END_TARGET _Pragma("clang attribute pop")
#else
#define BEGIN_TARGET(names) _Pragma("GCC push_options") PRAGMA(GCC target(names))
#define END_TARGET _Pragma("GCC pop_options")
#endif

namespace {

constexpr int CIRCLE = 128;  // the longest transform

// What layers by overlap-save return. NaN and infinite values spoil whole blocks: the output is void then.
enum Status { DONE = 0, NOT_FINITE = 1, NO_MEMORY = 2 };

struct Twiddles {
    float cosine[8 * CIRCLE], sine[8 * CIRCLE];
    Twiddles() {
        for (int k = 0; k < 8 * CIRCLE; k++) {
            const double angle = 2 * 3.14159265358979323846 * k / CIRCLE;
            cosine[k] = (float)std::cos(angle), sine[k] = (float)std::sin(angle);
        }
    }
};
const Twiddles TWIDDLES;

// x, samples, weights, bias, y, rows, channels
typedef int FirstLayer(const float*, int64_t, const float*, const float*, float*, int64_t, int64_t);
// x, frames, weights, bias, y, rows, channels in, channels, valid frames of a block
typedef int SpectralLayer(const float*, int64_t, const float*, const float*, float*, int64_t, int64_t, int64_t, int64_t);
// x, step, terms, panels, bias, relu, y, rows, columns, stride of y
typedef void ProductLayer(const float*, int64_t, int64_t, const float*, const float*, int32_t, float*, int64_t, int64_t, int64_t);

struct Kernels {
    const char* name;
    int32_t lanes, panel;
    FirstLayer* first_layer;
    SpectralLayer *pooled_64, *pooled_32, *plain_32;
    ProductLayer* product_layer;
};

#if defined(__x86_64__) || defined(_M_X64)
namespace sse2 {
#define NAME "sse2"
#define LANES 4
#include "lanes.h"
#undef LANES
#undef NAME
}  // namespace sse2
BEGIN_TARGET("avx2,fma")
namespace avx2 {
#define NAME "avx2"
#define LANES 8
#include "lanes.h"
#undef LANES
#undef NAME
}  // namespace avx2
END_TARGET
BEGIN_TARGET("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")
namespace avx512 {
#define NAME "avx512"
#define LANES 16
#include "lanes.h"
#undef LANES
#undef NAME
}  // namespace avx512
END_TARGET
#elif defined(__aarch64__)
namespace neon {
#define NAME "neon"
#define LANES 4
#include "lanes.h"
#undef LANES
#undef NAME
}  // namespace neon
#endif

}  // namespace

// The kernels of this name, or with "auto" the fastest that this processor runs; null if there are none.
// The number counts changes of the interface: library.py asks for its own, and finds none in an older build.
extern "C" __attribute__((visibility("default"))) const Kernels* soundnet_kernels_1(const char* name) {
    const bool any = std::strcmp(name, "auto") == 0;
#if defined(__x86_64__) || defined(_M_X64)
    if ((any || std::strcmp(name, "avx512") == 0) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
        return &avx512::KERNELS;
    if ((any || std::strcmp(name, "avx2") == 0) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &avx2::KERNELS;
    if (any || std::strcmp(name, "sse2") == 0) return &sse2::KERNELS;
#elif defined(__aarch64__)
    if (any || std::strcmp(name, "neon") == 0) return &neon::KERNELS;
#endif
    return nullptr;
}
