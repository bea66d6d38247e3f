"""The shared Vision Transformer and its parts."""
