"""Parts of the page of features."""
