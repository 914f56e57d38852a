"""What experts prefer: labels, tokens, positions, each other."""
