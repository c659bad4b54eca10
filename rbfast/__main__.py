"""`python -m rbfast`: the command line."""

import sys

from rbfast.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
