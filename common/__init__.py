"""What every stage needs and none owns. Imports none of the other packages."""

import os

# transformers warns at import of every image processor that does without torchvision, none of
# which is used here; it reads this variable once, so it must be set before anyone imports it.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
