"""What an intervention does: paired with its baseline on the same tokens, against matched random controls."""
