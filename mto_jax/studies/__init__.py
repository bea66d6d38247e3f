"""Many short runs, compared."""
