"""What a kernel launch asks: which config it gets, on which device, and from which file."""
