"""For all tests: one thread a process, since several processes share the cores."""

import os

# Before torch is imported; processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
