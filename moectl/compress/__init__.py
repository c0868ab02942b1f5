"""A Mixture-of-Experts checkpoint made smaller."""
