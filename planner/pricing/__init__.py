"""What a plan costs: the machines, the models and the price in seconds."""
