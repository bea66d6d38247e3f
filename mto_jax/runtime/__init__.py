"""Processes, devices, folders: what a run needs of its machine."""
