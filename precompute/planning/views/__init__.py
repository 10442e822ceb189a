"""What the latents of a row are of: crops of its picture, and their mirrors."""
