"""Sound files: finding and decoding them, their level, and the examples of the package."""
