"""Stage 2: trains a ControlNet from a cache; no source image, no VAE encoder, no text encoder."""
