"""What the author of a proposer, a scorer or a length policy reads, and nothing else."""
