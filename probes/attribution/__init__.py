"""What each part of a model adds to its logits, and which experts two sets of prompts tell apart."""
