"""Collectives, process groups, the watchdog, and what is counted and timed."""
