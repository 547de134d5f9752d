"""``python -m shardmerge``."""

import sys

from shardmerge.cli import main

sys.exit(main())
