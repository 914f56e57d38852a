"""Activity of neurons, in dense MLPs and inside experts."""
