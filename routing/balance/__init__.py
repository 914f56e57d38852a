"""How evenly routers share the work, and how sure they are."""
