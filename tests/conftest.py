"""One thread for each process of the tests, which are as many at once as there are cores.

Set before torch is imported, and inherited by all that the tests start: OpenMP's threads spin while
they wait for each other, and on two cores that took more time than the tests themselves.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
