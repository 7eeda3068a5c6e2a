"""Training of draft heads: data, the two objectives, the loop they share, and the report."""
