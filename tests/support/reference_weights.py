"""Weights and inputs of the reference files, after reference/FORMULA.md, bit for bit."""

import math

import numpy as np

# gain and mean of the formula, per convolution; the last entry is the heads'
_CONSTANTS = {
    "soundnet8": (
        [0.028, 1.8, 2.0, 2.0, 2.1, 1.6, 1.9, 3.3],
        [0.0, 1.1, 1.2, 0.42, 0.43, 1.1, 0.42, 0.41],
    ),
    "soundnet5": ([0.029, 1.8, 1.9, 1.5, 3.6], [0.0, 1.1, 1.2, 1.3, 0.43]),
}


def mix(x):
    x = np.asarray(x, np.uint32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return x ^ (x >> np.uint32(16))


def key(seed, stream):
    return mix(mix([seed]) ^ np.uint32((stream + 0x9E3779B9) % 2**32))


def word(k, i):
    return mix(mix(np.asarray(i).astype(np.uint32)) ^ k)


def bell(k, count):
    i = np.arange(count, dtype=np.uint32)
    a, b = (
        word(k, np.uint32(2) * i).astype(np.int64),
        word(k, np.uint32(2) * i + np.uint32(1)).astype(np.int64),
    )
    return (a & 0xFFFF) + (a >> 16) + (b & 0xFFFF) + (b >> 16) - 131070


def state_dict(architecture, seed):
    """The reference network's parameters, named and shaped as ours."""
    gains, means = _CONSTANTS[architecture.name]
    state, channels = {}, 1
    blocks = len(architecture.blocks)
    for number, row in enumerate((*architecture.blocks, *architecture.heads), 1):
        head = number > blocks
        out = row.categories if head else row.channels
        level = min(number, blocks + 1) - 1
        fan = channels * row.kernel
        k = gains[level] / math.sqrt(fan) / (37837 * 4 * row.kernel)
        z = bell(key(seed, 16 * number + 1), out * fan).reshape(out, channels, row.kernel)
        q = 4 * row.kernel * z - 3 * z.sum(2, keepdims=True)
        sums = q.sum((1, 2)).astype(np.float64)
        bias = bell(key(seed, 16 * number + 2), out) / 37837 * 0.3
        bias = (bias - means[level] * k * sums if head else bias).astype(np.float32)
        state[f"{row.name}.weight"] = (q.astype(np.float64) * k).astype(np.float32)
        state[f"{row.name}.bias"] = bias
        if head:
            continue
        gamma, beta, mean = (bell(key(seed, 16 * number + s), out) / 37837 for s in (3, 4, 5))
        shade = (word(key(seed, 16 * number + 6), np.arange(out)) >> np.uint32(8)) / 16777216
        state[f"{row.norm}.weight"] = (1 + gamma * 0.2).astype(np.float32)
        state[f"{row.norm}.bias"] = (beta * 0.3).astype(np.float32)
        offset = means[level] * k * sums + bias.astype(np.float64)
        state[f"{row.norm}.running_mean"] = (offset + mean * 0.2).astype(np.float32)
        state[f"{row.norm}.running_var"] = (0.2 + 2.8 * shade).astype(np.float32)
        channels = out
    return state


def samples(length):
    """The recorded input of that length as 16-bit samples; the network gets them / 128."""
    k = key(length, 7)
    n = np.arange(length)
    segment = n // 5513
    number = np.arange(segment[-1] + 1)
    total = np.zeros(length, np.int64)
    for j in range(4):
        w = word(k, 8 * number + j).astype(np.int64)
        step = (20 + (w >> 20) * (4 if j == 3 else 1))[segment]
        amplitude = (w & 0xFF)[segment]
        envelope = np.abs((n // 8 + 512 * j) % 2048 - 1024)
        phase = n * step % 65536
        r = phase % 32768
        size = (r * (32768 - r) // 8192) * amplitude * envelope // 1048576
        total += np.where(phase >= 32768, -size, size)
    level = (word(k, 8 * number + 4).astype(np.int64) & 0xFF)[segment]
    noise = (word(k, 0x40000000 + n).astype(np.int64) >> 20) - 2048
    return np.clip(total + noise * level // 64, -32768, 32767).astype(np.int16)


def waveform(length):
    return (samples(length) / 128).astype(np.float32)
