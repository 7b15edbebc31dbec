"""`python -m maskvlm` is `maskvlm`."""

import sys

from maskvlm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
