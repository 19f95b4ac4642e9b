"""`fastres bench`: measures the step and the loaders that `train` uses."""
