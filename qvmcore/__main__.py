"""``python -m qvmcore`` is ``qvm``."""

import sys

from qvmcore.cli import main

if __name__ == "__main__":
    sys.exit(main())
