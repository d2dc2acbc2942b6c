"""Compiled kernels for SoundNet's layers on a CPU: fast convolution in float32, for inference.

All blocks have stride 2, so each convolution is two filters of stride 1, over the even and over the odd
frames. Long filters cost fewer multiplications in the frequency domain, by overlap-save: the input is cut
into blocks that overlap by the filter's length less one, a block's transform is multiplied by the filter's
spectrum and transformed back, and the frames that did not wrap around are kept:

    input      |.........block 0.........|
                               |.........block 1.........|      each as long as the transform
    spectra    even input * even taps + odd input * odd taps    for each frequency
    output     |....valid....|.wrapped...|
                             |....valid....|.wrapped...|

- The first layer (1 channel in, kernel 64): blocks of 128 even and 128 odd samples give 96 frames. Two
  blocks are the real and the imaginary part of one series.
- A layer with kernel 32 takes 64 even and 64 odd frames, of which 48 frames come out; one with kernel 16
  takes 32 and gives 24. Even and odd frames are the real and the imaginary part of one series; for each
  frequency the channels go through one real matrix (4 * channels in, channels). Two channels that come out
  are the real and the imaginary part of one series, too.
- Short kernels, heads and all other shapes are matrix products, straight out of the frames as they lie.

Channels (in the first layer's forward transform, blocks) lie in the lanes of vectors, so a transform is a
plain network of butterflies on vectors: decimation in frequency, radix 4 and 8. Its outputs lie in
digit-reversed order. The last butterflies of the inverse transform hold frames of several pooling windows,
one of each at a time, so the maximum over a window is taken there, then bias and ReLU.

Multiplications for a frame and channel, 8-layer network: conv1 about 21 in place of 64, conv2 85 in
place of 512, conv3 171 in place of 512. Rounding is less than that of long sums: products add up in
chunks of 256 terms, and the error of a transform grows with the logarithm of its length. But a block has
one scale: a quiet frame carries the rounding of a loud one in its block, about 1e-7 of it, and a channel
that of the channel it is paired with. Blocks last 12 ms (conv1; two share their rounding), 93 ms (conv2)
and 0.74 s (conv3).

NaN and infinite values spoil a whole block. The kernels notice them in frequency 0, the sum of the block;
the engine then computes that block by its own operations, so that they reach only the frames that see them.

kernels.cpp chooses by processor, lanes.h is the code for vectors of 4, 8 or 16 floats, library.py loads
them, spectra.py brings weights into their layouts, and kernel_operations.py gives them to the engine.
"""
