"""Masked image modelling of Vision Transformers with masked token optimization (MTO), in JAX."""

__version__ = '0.13.0'
