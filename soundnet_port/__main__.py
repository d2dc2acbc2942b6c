"""`python -m soundnet_port` is the command `soundnet-port`."""

import sys

from soundnet_port.cli.main import main

sys.exit(main())
