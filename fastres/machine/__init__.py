"""What this machine is: its CPU, its GPU, its driver, and whether it will do."""
