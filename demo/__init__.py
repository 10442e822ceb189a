"""A demonstration: a data set of circles and a miniature Stable Diffusion 3 base model."""

import common  # noqa: F401  (it quiets the libraries, which must happen before they are imported)
