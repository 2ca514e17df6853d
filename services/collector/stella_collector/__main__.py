"""`python -m stella_collector --config FILE [--instance NAME] [--test-probes] [--replay FILE]`."""

import sys

from stella_collector.entry import main

sys.exit(main())
