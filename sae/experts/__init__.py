"""Latents joined to the experts that write and gate them; experts' neurons as features."""
