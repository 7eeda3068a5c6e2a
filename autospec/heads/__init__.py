"""Draft heads as plain modules: what a checkpoint is loaded into, what is captured, and what is trained."""
