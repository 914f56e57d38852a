"""`moescope sae`: sparse autoencoders over recorded vectors."""
