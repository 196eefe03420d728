"""CSC Train: train open models for customer support conversation (CSC): choose a support strategy, then reply."""

import logging

# bitsandbytes warns on import about a kernel that only 4-bit inference on a CPU would use.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
