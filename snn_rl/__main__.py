"""``python -m snn_rl`` is the command ``snn-rl``."""

import sys

from snn_rl.cli import main

sys.exit(main())
