"""Dense checkpoints become a plan for a MoE."""
