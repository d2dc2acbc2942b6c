"""The network itself: its table, its modules, the engine, streams, gradients, and weights files."""
