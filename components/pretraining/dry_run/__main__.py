"""``python -m components.pretraining.dry_run``; see ``components/pretraining/dry_run/dry_run.py``."""

import sys

from components.pretraining.dry_run.dry_run import main

sys.exit(main())
