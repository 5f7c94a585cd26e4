"""`python -m anynorm` is `anynorm`."""

import sys

from anynorm.cli import main

if __name__ == "__main__":
    sys.exit(main())
