"""Dual learned matching: the loss on the line, its gradients, and the optimiser on the generators of the group."""
