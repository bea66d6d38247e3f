"""Looking at programs: compiled ahead for TPUs, and counted."""
