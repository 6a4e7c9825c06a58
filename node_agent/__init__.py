"""The agent of a node, and `ferry`. ARCHITECTURE.md shows the parts."""

import os

# numpy's library for linear algebra, which nobody here needs, would start a thread for each core,
# and spin in them: 0.09 s of a core at each start. It is read once, when numpy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
