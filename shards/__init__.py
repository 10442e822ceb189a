"""The contract between the stages: the cache format, and how settings and base models are found.

Imports none of the other packages, so that a machine that only trains needs only this and `train`.
"""

import os

# transformers warns at import of every image processor that does without torchvision, none of
# which is used here; it reads this variable once, so it must be set before anyone imports it.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
