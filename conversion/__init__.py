"""From Torch7's files and other ports' to this project's weights, with parity checks.

t7.py reads Torch7's files, interpreter.py runs a file's own graph, mapping.py finds SoundNet in it, proof.py
compares the two, convert.py ties them together. ports.py and pickled.py read other ports' weights. fetch.py
and package.py get the released networks; recognition.py recognizes them, and released_parity.py compares
them with what real Torch7 computed. Always imported as `soundnet_port.conversion`.
"""
