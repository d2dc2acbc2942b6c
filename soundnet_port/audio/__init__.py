"""Sound files: finding them, decoding them, their level, and the sounds that ship with the package."""
