"""What can be run: one file each. A package, so that another `configs` on PYTHONPATH does not come before it."""
