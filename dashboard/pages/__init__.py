"""The pages: each file registers one `Page` when imported."""
