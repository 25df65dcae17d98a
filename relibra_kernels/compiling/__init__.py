"""Compile recorded launches without a GPU, and read what the machine code needs."""
