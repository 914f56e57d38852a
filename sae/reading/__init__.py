"""What the latents of an autoencoder fire on and write."""
