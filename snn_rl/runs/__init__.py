"""Trainings in stages: recipes, checkpoints, results and their report."""
