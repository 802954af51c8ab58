"""Property tests draw the same examples in every run, so that a red run can be made again.

HYPOTHESIS_PROFILE=explore draws new ones, ten times as many: for campaigns, not for landings. Neither has a limit on
an example's time, nor on the time that drawing takes: a busy machine is no defect.
"""

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "explore", max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))
