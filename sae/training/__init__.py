"""Training sparse autoencoders from recorded vectors."""
