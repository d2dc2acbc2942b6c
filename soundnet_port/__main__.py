"""Run the command line: `python -m soundnet_port`."""

import sys

from soundnet_port.cli.main import main

sys.exit(main())
