"""`python -m fedcanary`."""

import sys

from fedcanary.cli import main

sys.exit(main())
