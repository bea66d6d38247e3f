"""The loop, its state and step, optimizer, schedules and checkpoints."""
