"""How routing holds on from token to token."""
