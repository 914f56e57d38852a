"""A dense MLP seen as a sparse mixture of experts."""
