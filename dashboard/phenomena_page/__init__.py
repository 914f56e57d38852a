"""Parts of the page of phenomena."""
