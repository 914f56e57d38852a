"""`phenomena`: protocols that run a model: attention statistics, needles, repeated tokens, the chain and its cuts."""
