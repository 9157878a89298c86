"""python -m advvl: the command line."""

import sys

from advvl.experiments.cli import main

if __name__ == "__main__":
    sys.exit(main())
