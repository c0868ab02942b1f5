"""A layer small enough to measure in a test, and the roof it is measured under: TFLOP/s and GB/s."""

from moectl.bench.shapes import Shape

SMALL = Shape(32, 16, 6, 2, name="small")
ROOF = (0.05, 20.0)
