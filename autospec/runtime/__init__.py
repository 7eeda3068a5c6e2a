"""Runs programs: requests in, tokens out. Imports no compiler, so that a saved program needs none."""
