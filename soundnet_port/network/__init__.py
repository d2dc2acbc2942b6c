"""SoundNet itself: architectures, the plain modules, the engine, gradients, streams, weights files.

It imports nothing of the package but `errors` and `files`.
"""
