"""Edits on a live model: compiled to tensors beside the weights, applied while it runs, gone when their context ends."""
