"""Property tests draw the same examples in every run, so that a red run can be made again.

HYPOTHESIS_PROFILE=explore draws new ones, ten times as many: for campaigns, not for landings.
"""

import os

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True)
settings.register_profile("explore", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))
