"""The way of an expert: parameters, replicas, migration, gradients, checkpoints."""
