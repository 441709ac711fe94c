"""Files, limits and progress: what every other part of the package uses."""
