"""Kernels behind one choice of implementation; every op has a reference in plain jnp."""
