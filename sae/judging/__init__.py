"""How good an autoencoder is, beside controls."""
