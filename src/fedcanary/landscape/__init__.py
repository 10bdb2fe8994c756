"""What benchmarks measure of the six modes: twelve published ones, and this package on its own evidence."""
