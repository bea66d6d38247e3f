"""Masked image modelling of Vision Transformers with masked token optimization (MTO), in JAX."""
