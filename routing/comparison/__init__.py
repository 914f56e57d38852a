"""Two runs of the same tokens beside each other."""
