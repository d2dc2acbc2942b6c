"""From Torch7's files and other ports' to this project's weights, with parity checks.

- t7.py opens Torch7 files; t7_objects.py, t7_binary.py and t7_ascii.py read them.
- graph.py and mapping.py find SoundNet in a file's graph; interpreter.py runs that graph, and parity.py
  compares it with the converted network; convert.py does all of it, and info.py describes a file.
- ports.py converts other ports' weights; port_files.py and unpickling.py read them, port_networks.py arranges
  them, port_comparison.py compares them with weights from Torch7.
- fetch.py and package.py get the released networks, recognition.py recognizes them, and released_parity.py
  compares them with recordings of real Torch7; golden.py pins any network's numbers.

Always imported as `soundnet_port.conversion`.
"""
