"""`python -m equilibria` is the command `equilibria`, for launchers that want a module."""

import sys

from equilibria.cli.main import main

sys.exit(main())
