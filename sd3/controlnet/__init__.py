"""What is special about SD3's ControlNets: the conventions that each was trained in."""
