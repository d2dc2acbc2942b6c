// The kernels for one width of vectors. kernels.cpp includes this file once for each target, inside a namespace
// and with LANES defined: the floats in a vector.
//
// Frames are rows: one after the other, their channels side by side. Every convolution has stride 2. Channels lie
// in the lanes of vectors, so a transform of LANES series is a plain butterfly network on vectors.

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef float UnalignedVector __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

INLINE Vector load(const float* from) { return *(const UnalignedVector*)from; }
INLINE void store(float* to, Vector value) { *(UnalignedVector*)to = value; }
INLINE Vector maximum(Vector a, Vector b) { return a > b ? a : b; }
INLINE Vector rectify(Vector value) { return Vector{} > value ? Vector{} : value; }  // keeps NaN, as ReLU does

INLINE bool all_zero(Vector value) {
    for (int lane = 0; lane < LANES; lane++)
        if (!(value[lane] == 0.f)) return false;
    return true;
}

struct Complex {
    Vector re, im;
};

// ---- Transposition, so that a vector's lanes go to LANES places

// Exchanges the blocks off the diagonal in all 2 HALF x 2 HALF blocks of a matrix whose rows are vectors.
template <int HALF, int... J> INLINE void exchange(Vector* rows, std::integer_sequence<int, J...>) {
    for (int i = 0; i < LANES; i++)
        if (!(i & HALF)) {
            const Vector a = rows[i], b = rows[i + HALF];
            rows[i] = __builtin_shufflevector(a, b, (J & HALF ? LANES + J - HALF : J)...);
            rows[i + HALF] = __builtin_shufflevector(a, b, (J & HALF ? LANES + J : J + HALF)...);
        }
}

INLINE void transpose(Vector* rows) {
    constexpr auto lanes = std::make_integer_sequence<int, LANES>();
    exchange<1>(rows, lanes);
    exchange<2>(rows, lanes);
    if constexpr (LANES > 4) exchange<4>(rows, lanes);
    if constexpr (LANES > 8) exchange<8>(rows, lanes);
}

// Writes lane l of the four vectors side by side to to + l * stride.
template <int... J> INLINE void store_quadruples(float* to, int64_t stride, const Vector* v, std::integer_sequence<int, J...>) {
    const Vector low_02 = __builtin_shufflevector(v[0], v[2], (J % 2 * LANES + J / 4 * 4 + J % 4 / 2)...);
    const Vector high_02 = __builtin_shufflevector(v[0], v[2], (J % 2 * LANES + J / 4 * 4 + J % 4 / 2 + 2)...);
    const Vector low_13 = __builtin_shufflevector(v[1], v[3], (J % 2 * LANES + J / 4 * 4 + J % 4 / 2)...);
    const Vector high_13 = __builtin_shufflevector(v[1], v[3], (J % 2 * LANES + J / 4 * 4 + J % 4 / 2 + 2)...);
    const Vector lanes[4] = {
        __builtin_shufflevector(low_02, low_13, (J % 2 * LANES + J / 4 * 4 + J % 4 / 2)...),
        __builtin_shufflevector(low_02, low_13, (J % 2 * LANES + J / 4 * 4 + J % 4 / 2 + 2)...),
        __builtin_shufflevector(high_02, high_13, (J % 2 * LANES + J / 4 * 4 + J % 4 / 2)...),
        __builtin_shufflevector(high_02, high_13, (J % 2 * LANES + J / 4 * 4 + J % 4 / 2 + 2)...),
    };
    for (int quarter = 0; quarter < 4; quarter++)
        for (int l = 0; l < LANES / 4; l++) std::memcpy(to + (4 * l + quarter) * stride, (const float*)&lanes[quarter] + 4 * l, 4 * sizeof(float));
}

// ---- Butterflies: transforms of length 4 and 8, b[q] = sum over m of a[m] exp(SIGN 2 pi i q m / R), in place

template <int SIGN> INLINE void butterfly_4(Complex* a) {
    constexpr float sign = SIGN;
    const Complex sum02 = {a[0].re + a[2].re, a[0].im + a[2].im}, dif02 = {a[0].re - a[2].re, a[0].im - a[2].im};
    const Complex sum13 = {a[1].re + a[3].re, a[1].im + a[3].im};
    const Complex dif13 = {sign * (a[1].re - a[3].re), sign * (a[1].im - a[3].im)};
    a[0] = {sum02.re + sum13.re, sum02.im + sum13.im};
    a[1] = {dif02.re - dif13.im, dif02.im + dif13.re};
    a[2] = {sum02.re - sum13.re, sum02.im - sum13.im};
    a[3] = {dif02.re + dif13.im, dif02.im - dif13.re};
}

template <int RADIX, int SIGN> INLINE void butterfly(Complex* a) {
    if constexpr (RADIX == 4) {
        butterfly_4<SIGN>(a);
    } else {
        static_assert(RADIX == 8, "radix 4 or 8");
        constexpr float sign = SIGN, half_root = 0.70710678118654752f;
        Complex even[4] = {a[0], a[2], a[4], a[6]}, odd[4] = {a[1], a[3], a[5], a[7]};
        butterfly_4<SIGN>(even);
        butterfly_4<SIGN>(odd);
        const Complex rotated[4] = {
            odd[0],
            {half_root * (odd[1].re - sign * odd[1].im), half_root * (odd[1].im + sign * odd[1].re)},
            {-sign * odd[2].im, sign * odd[2].re},
            {-half_root * (odd[3].re + sign * odd[3].im), half_root * (sign * odd[3].re - odd[3].im)},
        };
        for (int q = 0; q < 4; q++) {
            a[q] = {even[q].re + rotated[q].re, even[q].im + rotated[q].im};
            a[q + 4] = {even[q].re - rotated[q].re, even[q].im - rotated[q].im};
        }
    }
}

// Writes b[q] times the twiddle factor exp(SIGN 2 pi i q angle / CIRCLE) to to[q * step].
template <int RADIX, int SIGN> INLINE void twiddle(Complex* to, int step, const Complex* b, int angle) {
    to[0] = b[0];
    for (int q = 1; q < RADIX; q++) {
        const float c = TWIDDLES.cosine[q * angle], s = SIGN * TWIDDLES.sine[q * angle];
        to[q * step] = {b[q].re * c - b[q].im * s, b[q].im * c + b[q].re * s};
    }
}

// One stage of decimation in frequency, in place: a transform of N points whose parts have LENGTH points becomes
// one whose parts have LENGTH / RADIX. Part q then holds the outputs with index RADIX j + q, so after all stages
// the outputs lie in digit-reversed order.
template <int N, int LENGTH, int RADIX, int SIGN> INLINE void stage(Complex* points) {
    constexpr int STEP = LENGTH / RADIX;
    for (int part = 0; part < N; part += LENGTH)
        for (int j = 0; j < STEP; j++) {
            Complex a[RADIX];
            for (int m = 0; m < RADIX; m++) a[m] = points[part + j + m * STEP];
            butterfly<RADIX, SIGN>(a);
            twiddle<RADIX, SIGN>(points + part + j, STEP, a, STEP > 1 ? j * (CIRCLE / LENGTH) : 0);
        }
}

// ---- The first layer: one channel in, kernel up to 64, maximum over 8 frames
//
// A block is 256 samples: 128 even and 128 odd ones, whose transforms are multiplied by those of the even and the
// odd taps and added. Of the 128 frames that come back, the first 97 are not wrapped around; 96 make 12 rows. Two
// blocks are the real and the imaginary part of one series. The forward transforms have blocks in the lanes, the
// inverse ones channels; in between, spectra are transposed. The inverse transform's last butterflies have 8 frames
// of 8 rows at hand, so the maximum costs no pass of its own.

constexpr int FIRST_POINTS = 128, FIRST_ROWS = 12, FIRST_POOL = 8, FIRST_SPECTRUM = 65;
constexpr int FIRST_BLOCK = 2 * FIRST_POINTS, FIRST_HOP = FIRST_ROWS * FIRST_POOL * 2;  // samples

typedef float BlockPair[FIRST_POINTS][4];  // spectra of even and odd samples: re, im, re, im

INLINE void first_inverse(const BlockPair& spectra, const float* weights, Vector bias, float* rows_a, float* rows_b, int64_t stride) {
    Complex points[FIRST_POINTS];
    for (int j = 0; j < 32; j++) {
        Complex a[4];
#pragma GCC unroll 4
        for (int m = 0; m < 4; m++) {
            const int k = j + 32 * m;
            const float* w = weights + (m < 2 ? k : FIRST_POINTS - k) * 4 * LANES;  // the filters are real
            const float *z = spectra[k];
            const Vector even_re = load(w), even_im = load(w + LANES), odd_re = load(w + 2 * LANES), odd_im = load(w + 3 * LANES);
            const Vector re = even_re * z[0] + odd_re * z[2], im = even_re * z[1] + odd_re * z[3];
            if (m < 2) a[m] = {re - even_im * z[1] - odd_im * z[3], im + even_im * z[0] + odd_im * z[2]};
            else a[m] = {re + even_im * z[1] + odd_im * z[3], im - even_im * z[0] - odd_im * z[2]};
        }
        butterfly<4, 1>(a);
        twiddle<4, 1>(points + j, 32, a, j * (CIRCLE / FIRST_POINTS));
    }
    stage<FIRST_POINTS, 32, 4, 1>(points);
    // frame 8 row + i has digits i % 4, 2 (row % 2) + i / 4 and row / 2
    for (int parity = 0; parity < 2; parity++) {
        Complex largest[FIRST_ROWS / 2];
        for (int i = 0; i < FIRST_POOL; i++) {
            Complex a[8];
            for (int m = 0; m < 8; m++) a[m] = points[(i % 4) * 32 + (2 * parity + i / 4) * 8 + m];
            butterfly<8, 1>(a);
            for (int q = 0; q < FIRST_ROWS / 2; q++) {
                largest[q].re = i ? maximum(largest[q].re, a[q].re) : a[q].re;
                largest[q].im = i ? maximum(largest[q].im, a[q].im) : a[q].im;
            }
        }
        for (int q = 0; q < FIRST_ROWS / 2; q++) {
            store(rows_a + (2 * q + parity) * stride, rectify(largest[q].re + bias));
            store(rows_b + (2 * q + parity) * stride, rectify(largest[q].im + bias));
        }
    }
}

static int first_layer(const float* x, int64_t samples, const float* weights, const float* bias, float* y, int64_t rows, int64_t channels) {
    alignas(64) Complex phase[2][FIRST_POINTS];  // lanes are pairs of blocks
    alignas(64) BlockPair spectra[LANES];
    float padded[2 * LANES][FIRST_BLOCK];
    float not_finite = 0;
    for (int64_t row = 0; row < rows; row += 2 * LANES * FIRST_ROWS) {
        const float* blocks[2 * LANES];
        for (int b = 0; b < 2 * LANES; b++) {
            const int64_t start = std::min(samples, row * FIRST_POOL * 2 + (int64_t)b * FIRST_HOP);
            const int64_t left = std::min<int64_t>(FIRST_BLOCK, samples - start);
            blocks[b] = x + start;
            if (left < FIRST_BLOCK) {
                std::copy(x + start, x + start + left, padded[b]);
                std::fill(padded[b] + left, padded[b] + FIRST_BLOCK, 0.f);
                blocks[b] = padded[b];
            }
        }
        for (int t = 0; t < FIRST_BLOCK; t += LANES) {
            Vector re[LANES], im[LANES];
            for (int lane = 0; lane < LANES; lane++) re[lane] = load(blocks[2 * lane] + t), im[lane] = load(blocks[2 * lane + 1] + t);
            transpose(re);
            transpose(im);
            for (int s = 0; s < LANES; s++) phase[s % 2][(t + s) / 2] = {re[s], im[s]};
        }
        for (auto& points : phase) {
            stage<FIRST_POINTS, 128, 4, -1>(points);
            stage<FIRST_POINTS, 32, 4, -1>(points);
            stage<FIRST_POINTS, 8, 8, -1>(points);
        }
        // frequency 0 is the sum of all samples; x - x is NaN for NaN and infinity
        const Vector sums = phase[0][0].re + phase[0][0].im + phase[1][0].re + phase[1][0].im;
        for (int lane = 0; lane < LANES && row + 2 * lane * FIRST_ROWS < rows; lane++) not_finite += sums[lane] - sums[lane];
        for (int p = 0; p < FIRST_POINTS; p++) {
            const int k = p / 32 + 4 * (p / 8 % 4) + 16 * (p % 8);
            const Vector parts[4] = {phase[0][p].re, phase[0][p].im, phase[1][p].re, phase[1][p].im};
            store_quadruples(spectra[0][k], FIRST_POINTS * 4, parts, std::make_integer_sequence<int, LANES>());
        }
        for (int64_t c = 0; c < channels; c += LANES)
            for (int lane = 0; lane < LANES; lane++) {
                const int64_t start = row + 2 * lane * FIRST_ROWS;
                if (start >= rows) break;
                const float* w = weights + c * FIRST_SPECTRUM * 4;
                float* to = y + start * channels + c;
                if (start + 2 * FIRST_ROWS <= rows) {
                    first_inverse(spectra[lane], w, load(bias + c), to, to + FIRST_ROWS * channels, channels);
                } else {
                    float ends[2 * FIRST_ROWS * LANES];
                    first_inverse(spectra[lane], w, load(bias + c), ends, ends + FIRST_ROWS * LANES, LANES);
                    for (int64_t r = 0; r < rows - start; r++) store(to + r * channels, load(ends + r * LANES));
                }
            }
    }
    return not_finite == 0 ? DONE : NOT_FINITE;
}

// ---- Products

constexpr int PRODUCT_ROWS = LANES == 16 ? 12 : LANES == 8 ? 6 : 4;  // so that all sums are in registers
constexpr int PRODUCT_VECTORS = LANES == 4 ? 4 : 2;
constexpr int PANEL = PRODUCT_VECTORS * LANES;
constexpr int64_t CHUNK = 256;  // terms in one sum; long sums in float32 lose digits

// sums[row] += sum over k of a[row * step + k] * w[k * width]
template <int ROWS> INLINE void multiply_add(Vector (*sums)[PRODUCT_VECTORS], const float* a, int64_t step, int64_t terms, const float* w, int64_t width) {
    for (int64_t k = 0; k < terms; k++, w += width) {
        Vector columns[PRODUCT_VECTORS];
        for (int v = 0; v < PRODUCT_VECTORS; v++) columns[v] = load(w + v * LANES);
        for (int row = 0; row < ROWS; row++)
            for (int v = 0; v < PRODUCT_VECTORS; v++) sums[row][v] += a[row * step + k] * columns[v];
    }
}

// ---- A layer of many channels by overlap-save
//
// Even and odd frames are the real and the imaginary part of one series z of POINTS frames. The spectrum of a sum of
// two filters, of the even and of the odd frames, is linear in re z[k], im z[k], re z[-k] and im z[-k]: for each
// frequency a real matrix (4 channels in, channels out). Of the channels that come out, the second half is the
// imaginary part of the first, so one inverse transform brings back two channels.

template <int POINTS, int POOL>
static int spectral_layer(const float* x, int64_t frames, const float* weights, const float* bias, float* y, int64_t rows, int64_t channels_in, int64_t channels, int64_t valid) {
    constexpr int BLOCKS = 12, RADIX = POINTS / 8;  // blocks at a time
    static_assert(BLOCKS % PRODUCT_ROWS == 0, "whole products");
    const int64_t half = channels / 2, block_rows = valid / POOL, width = 2 * channels_in;
    const int64_t size_in = POINTS * BLOCKS * width, size_out = POINTS * BLOCKS * channels;
    const int64_t size = size_in + size_out + 2 * POINTS * channels_in + block_rows * channels;
    const std::unique_ptr<float[]> buffer(new (std::nothrow) float[size]());
    if (!buffer) return NO_MEMORY;
    float *spectra_in = buffer.get(), *spectra_out = spectra_in + size_in;
    float *padded = spectra_out + size_out, *ends = padded + 2 * POINTS * channels_in;
    Complex points[POINTS];
    Vector not_finite = {};
    for (int64_t row = 0; row < rows; row += BLOCKS * block_rows) {
        const int64_t blocks = std::min<int64_t>(BLOCKS, (rows - row + block_rows - 1) / block_rows);
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t start = std::min(frames, (row + b * block_rows) * POOL * 2), left = std::min<int64_t>(2 * POINTS, frames - start);
            const float* from = x + start * channels_in;
            if (left < 2 * POINTS) {
                std::copy(from, from + left * channels_in, padded);
                std::fill(padded + left * channels_in, padded + 2 * POINTS * channels_in, 0.f);
                from = padded;
            }
            for (int64_t c = 0; c < channels_in; c += LANES) {
                for (int t = 0; t < POINTS; t++) points[t] = {load(from + 2 * t * channels_in + c), load(from + (2 * t + 1) * channels_in + c)};
                stage<POINTS, POINTS, 8, -1>(points);
                for (int p = 0; p < 8; p++) {
                    butterfly<RADIX, -1>(points + p * RADIX);
                    for (int q = 0; q < RADIX; q++) {
                        float* to = spectra_in + ((p + 8 * q) * BLOCKS + b) * width + c;
                        store(to, points[p * RADIX + q].re), store(to + channels_in, points[p * RADIX + q].im);
                    }
                }
                not_finite += points[0].re - points[0].re;
                not_finite += points[0].im - points[0].im;
            }
        }
        for (int k = 0; k < POINTS; k++)
            for (int64_t c = 0; c < channels; c += PANEL)
                for (int64_t b = 0; b < blocks; b += PRODUCT_ROWS) {
                    Vector sums[PRODUCT_ROWS][PRODUCT_VECTORS] = {};
                    const float* w = weights + k * 2 * width * channels + c;
                    const float* direct = spectra_in + (k * BLOCKS + b) * width;
                    const float* mirrored = spectra_in + ((POINTS - k) % POINTS * BLOCKS + b) * width;
                    multiply_add<PRODUCT_ROWS>(sums, direct, width, width, w, channels);
                    multiply_add<PRODUCT_ROWS>(sums, mirrored, width, width, w + width * channels, channels);
                    for (int r = 0; r < PRODUCT_ROWS; r++)
                        for (int v = 0; v < PRODUCT_VECTORS; v++) store(spectra_out + (k * BLOCKS + b + r) * channels + c + v * LANES, sums[r][v]);
                }
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t start = row + b * block_rows, count = std::min(block_rows, rows - start);
            float* to = count == block_rows ? y + start * channels : ends;
            for (int64_t c = 0; c < half; c += LANES) {
                for (int k = 0; k < POINTS; k++) {
                    const float* from = spectra_out + (k * BLOCKS + b) * channels + c;
                    points[k] = {load(from), load(from + half)};
                }
                stage<POINTS, POINTS, 8, 1>(points);
                const Vector bias_re = load(bias + c), bias_im = load(bias + c + half);
                Complex largest[RADIX];
                for (int p = 0; p < 8; p++) {  // frame p + 8 q
                    Complex* a = points + p * RADIX;
                    butterfly<RADIX, 1>(a);
                    for (int q = 0; q < RADIX; q++) {
                        if constexpr (POOL == 8) {
                            largest[q].re = p ? maximum(largest[q].re, a[q].re) : a[q].re;
                            largest[q].im = p ? maximum(largest[q].im, a[q].im) : a[q].im;
                        } else if (p + 8 * q < valid) {
                            store(to + (p + 8 * q) * channels + c, rectify(a[q].re + bias_re));
                            store(to + (p + 8 * q) * channels + c + half, rectify(a[q].im + bias_im));
                        }
                    }
                }
                if constexpr (POOL == 8)
                    for (int q = 0; q < block_rows; q++) {
                        store(to + q * channels + c, rectify(largest[q].re + bias_re));
                        store(to + q * channels + c + half, rectify(largest[q].im + bias_im));
                    }
            }
            if (to == ends) std::copy(ends, ends + count * channels, y + start * channels);
        }
    }
    return all_zero(not_finite) ? DONE : NOT_FINITE;
}

// ---- A layer as a matrix product: windows of the input, as they lie, times columns
//
// Columns come in panels (columns / PANEL, terms, PANEL), the last one filled up with zeros, so any number will do.

template <int ROWS>
static void product_rows(int64_t rows, const float* x, int64_t step, int64_t terms, const float* panel, const float* bias, bool relu, float* y, int64_t columns, int64_t stride) {
    if constexpr (ROWS > 1)
        if (rows < ROWS) return product_rows<ROWS - 1>(rows, x, step, terms, panel, bias, relu, y, columns, stride);
    Vector totals[ROWS][PRODUCT_VECTORS] = {};
    for (int64_t k = 0; k < terms; k += CHUNK) {
        Vector sums[ROWS][PRODUCT_VECTORS] = {};
        multiply_add<ROWS>(sums, x + k, step, std::min(CHUNK, terms - k), panel + k * PANEL, PANEL);
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < PRODUCT_VECTORS; v++) totals[r][v] += sums[r][v];
    }
    for (int r = 0; r < ROWS; r++) {
        float ends[PANEL];
        float* to = columns >= PANEL ? y + r * stride : ends;
        for (int v = 0; v < PRODUCT_VECTORS; v++) {
            const Vector sum = totals[r][v] + load(bias + v * LANES);
            store(to + v * LANES, relu ? rectify(sum) : sum);
        }
        if (to == ends) std::copy(ends, ends + columns, y + r * stride);
    }
}

static void product_layer(const float* x, int64_t step, int64_t terms, const float* panels, const float* bias, int32_t relu, float* y, int64_t rows, int64_t columns, int64_t stride) {
    const int64_t parts = (rows + PRODUCT_ROWS - 1) / PRODUCT_ROWS;
    for (int64_t c = 0; c < columns; c += PANEL)
        for (int64_t part = 0; part < parts; part++) {
            const int64_t start = rows * part / parts, stop = rows * (part + 1) / parts;
            product_rows<PRODUCT_ROWS>(stop - start, x + start * step, step, terms, panels + c * terms, bias + c, relu, y + start * stride + c, columns - c, stride);
        }
}

static const Kernels KERNELS = {
    NAME, LANES, PANEL, first_layer, spectral_layer<64, 8>, spectral_layer<32, 8>, spectral_layer<32, 1>, product_layer,
};
