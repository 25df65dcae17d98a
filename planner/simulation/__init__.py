"""Policies compared on the same loads: the simulator, its workloads and the baselines."""
