"""`python -m stella_signer`: see `app`."""

import sys

from stella_signer.app import main

if __name__ == "__main__":
    sys.exit(main())
