"""The Triton kernels and what launches them. Importing anything here needs Triton."""
