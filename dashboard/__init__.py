"""The Dash app: one file a page, figures taken from results."""
