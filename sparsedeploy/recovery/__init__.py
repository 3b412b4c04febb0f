"""Recovery of quality inside the mask: one method a file, found by its name."""
