"""Families of models with experts: the tiny models that stand for them."""
