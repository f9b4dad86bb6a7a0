"""Where the tests of this folder run: on a GPU, by `make test-gpu`, which sets DCN_NP_TEST_GPU=1.

With "emulated" those that only look at results run in the emulation, few cases of each: a rehearsal, by which
the ordinary tests keep these working. Without the variable none is collected.
"""

import os

EMULATED = os.environ.get("DCN_NP_TEST_GPU") == "emulated"


def seeds(count):
    """As many seeds as there is time for."""
    return range(max(3, count // 200) if EMULATED else count)
