"""Parts of the comparison of two runs."""
