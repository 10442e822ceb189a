"""Stage 3: pictures from a ControlNet, through the stock diffusers pipeline."""
