"""`python -m xdpnet` is the command `xdpnet`."""

import sys

from xdpnet.cli import main

sys.exit(main())
