"""Other routers on the recorded logits."""
