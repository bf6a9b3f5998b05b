"""How good a stack is on data, how sure that is, and what is found by it: weights, culprits."""
