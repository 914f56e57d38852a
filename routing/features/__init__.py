"""Analyses of sparse autoencoders, their features, sparse probes and students of MLPs."""
