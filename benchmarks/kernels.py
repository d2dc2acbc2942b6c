r"""Random shapes on all kernels against float64: python benchmarks/kernels.py [SHAPES [SEED [LIBRARY]]].

LIBRARY is another build of soundnet_port/network/kernels/kernels.cpp, for example with sanitizers:

    g++ -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -std=gnu++17 -Wno-psabi -fPIC -shared \
        -fvisibility=hidden -o /tmp/kernels.so soundnet_port/network/kernels/kernels.cpp
    ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(g++ -print-file-name=libasan.so)" \
        python benchmarks/kernels.py 10000 0 /tmp/kernels.so

Buffers are as long as the kernels may read and write, to the byte, so that sanitizers see what goes beyond.
"""

import sys
import time
from ctypes import CDLL, POINTER, c_char_p

import numpy as np
import torch

from soundnet_port.network.kernels import library
from soundnet_port.network.kernels.library import CHOICES, DONE
from soundnet_port.network.kernels.spectra import first_spectra, layer_spectra, panels

TOLERANCE = 2e-5  # of the largest value; products of few terms with a small result come close to 1e-5
LAYERS = [("pooled_64", 64, 8), ("pooled_32", 32, 8), ("plain_32", 32, 1)]


def exact(values):
    """Return a flat float32 copy in memory of its own."""
    flat = np.asarray(values).ravel()
    copy = np.empty(len(flat), np.float32)
    copy[:] = flat
    return copy


def expect(x, weight, bias, rows, pool, relu):
    """Compute a layer in float64: x (frames, channels in), weight (channels, channels in, kernel)."""
    windows = np.lib.stride_tricks.sliding_window_view(x.astype(float), weight.shape[2], 0)[::2]
    frames = np.einsum("fck,ock->fo", windows[: rows * pool], weight)
    values = frames.reshape(rows, pool, -1).max(1) + bias
    return np.maximum(values, 0) if relu else values


def draw_input(rng, rows, pool, kernel, channels):
    frames = 2 * rows * pool - 2 + kernel + int(rng.integers(0, 40))
    return rng.standard_normal((frames, channels)).astype(np.float32)


def try_first(rng, kernels):
    channels, kernel = kernels.lanes * int(rng.integers(1, 3)), 2 * int(rng.integers(1, 33))
    rows = int(rng.integers(1, 60))
    x, weight = draw_input(rng, rows, 8, kernel, 1), rng.standard_normal((channels, 1, kernel))
    bias, y, samples = exact(rng.standard_normal(channels)), exact(np.zeros(rows * channels)), exact(x)
    spectra = exact(first_spectra(torch.from_numpy(weight), kernels.lanes))
    pointers = (values.ctypes.data for values in (spectra, bias, y))
    assert kernels.first_layer(samples.ctypes.data, len(x), *pointers, rows, channels) == DONE
    return y.reshape(rows, -1), expect(x, weight, bias, rows, 8, True)


def try_spectral(rng, kernels):
    name, points, pool = LAYERS[rng.integers(0, 3)]
    channels = max(kernels.panel, 2 * kernels.lanes) * int(rng.integers(1, 3))
    channels_in, kernel = kernels.lanes * int(rng.integers(1, 4)), 2 * int(rng.integers(1, points // 4 + 1))
    rows = int(rng.integers(1, 20 if pool > 1 else 80))
    x = draw_input(rng, rows, pool, kernel, channels_in)
    weight = rng.standard_normal((channels, channels_in, kernel))
    bias, y, frames = exact(rng.standard_normal(channels)), exact(np.zeros(rows * channels)), exact(x)
    spectra = exact(layer_spectra(torch.from_numpy(weight), points))
    valid = (points - (kernel // 2 - 1)) // 8 * 8
    pointers = (values.ctypes.data for values in (spectra, bias, y))
    compute = getattr(kernels, name)
    assert compute(frames.ctypes.data, len(x), *pointers, rows, channels_in, channels, valid) == DONE
    return y.reshape(rows, -1), expect(x, weight, bias, rows, pool, True)


def try_product(rng, kernels):
    channels, channels_in, kernel = (int(rng.integers(1, most)) for most in (80, 40, 16))
    rows, relu = int(rng.integers(1, 50)), bool(rng.integers(0, 2))
    x = draw_input(rng, rows, 1, kernel, channels_in)[: 2 * rows - 2 + kernel]
    weight, bias = rng.standard_normal((channels, channels_in, kernel)), rng.standard_normal(channels)
    columns = torch.from_numpy(weight.transpose(2, 1, 0).reshape(-1, channels).astype(np.float32))
    cut = exact(panels(columns, kernels.panel))
    padded_bias = exact(np.pad(bias, (0, -channels % kernels.panel)))
    stride = channels + int(rng.integers(0, 5))  # columns beside the result stay as they are
    y, frames = exact(np.full((rows - 1) * stride + channels, 7)), exact(x)
    pointers = (cut.ctypes.data, padded_bias.ctypes.data, int(relu), y.ctypes.data)
    terms = kernel * channels_in
    kernels.product_layer(frames.ctypes.data, 2 * channels_in, terms, *pointers, rows, channels, stride)
    table = np.pad(y, (0, stride - channels), constant_values=7).reshape(rows, stride)
    assert (table[:, channels:] == 7).all()
    return table[:, :channels], expect(x, weight, padded_bias[:channels], rows, 1, relu)


def main(shapes=10_000, seed=0, path=None):
    if path:
        compiled = CDLL(path)
        compiled.soundnet_kernels.argtypes = [c_char_p]
        compiled.soundnet_kernels.restype = POINTER(library.Kernels)
    else:
        compiled = library.load_library()
    sets = [pointer.contents for n in CHOICES[1:-1] if (pointer := compiled.soundnet_kernels(n.encode()))]
    rng, began = np.random.default_rng(int(seed)), time.monotonic()
    worst = {}
    for number in range(int(shapes)):
        kernels = sets[number % len(sets)]
        work = (try_first, try_spectral, try_spectral, try_spectral, try_product)[rng.integers(0, 5)]
        values, expected = work(rng, kernels)
        error = float(np.abs(values - expected).max() / max(np.abs(expected).max(), 1e-3))
        assert error < TOLERANCE, (
            f"shape {number} (seed {seed}), {kernels.name}, {work.__name__}: {error:.1e}"
        )
        worst[work.__name__] = max(worst.get(work.__name__, 0), error)
    figures = ", ".join(f"{name.removeprefix('try_')} {error:.1e}" for name, error in sorted(worst.items()))
    names = ", ".join(kernels.name for kernels in sets)
    print(f"{shapes} shapes on {names}: largest error {figures}; {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
