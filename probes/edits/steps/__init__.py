"""What each kind of edit does, one file a kind or a close family."""
