"""From Torch7's files to this project's weights, and the proof that both agree.

t7.py reads the file, interpreter.py runs the file's own graph, mapping.py finds SoundNet in it,
proof.py compares the two, convert.py ties them together. Always imported as
`soundnet_port.conversion`.
"""
