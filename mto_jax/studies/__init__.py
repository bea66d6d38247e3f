"""Many short trainings, compared."""
