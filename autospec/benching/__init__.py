"""What `autospec bench` is made of: recording steps, splitting their time, sweeping trees, drawing."""
