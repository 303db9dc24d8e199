"""``python -m aioinfer`` is the command ``aioinfer``."""

import sys

from aioinfer.cli import main

sys.exit(main())
