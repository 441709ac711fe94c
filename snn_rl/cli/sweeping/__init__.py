"""Sweeps: recipes, variants of them and seeds as runs on Ray, gathered into one table.

A run is what `snn_rl.runs.agent.run` makes in its folder, so that the same sweep skips what is finished, and a run
whose worker dies goes on from its checkpoint on another one. The folders must be on a file system that all machines
share.
"""
