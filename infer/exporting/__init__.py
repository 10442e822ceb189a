"""ControlNets as files for other programs."""
