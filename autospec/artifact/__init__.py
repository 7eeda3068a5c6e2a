"""The directory that a program is exported to: what stands in it, and what is checked before any of it is read."""
