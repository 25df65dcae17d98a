"""What the devices can do, which configs they get, and compiling without a GPU."""
