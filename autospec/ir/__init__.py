"""The compiler's frame: graphs with declared inputs, passes over them, and their text."""
