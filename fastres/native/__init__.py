"""What training on a CPU does that torch has no kernel for, or a slower one."""
