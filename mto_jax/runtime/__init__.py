"""Processes, devices and folders: the interface to the machine."""
