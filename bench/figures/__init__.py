"""The experiments of the Constitutional AI paper (arXiv 2212.08073) again, on the toy world or any other configuration.

    python -m bench.figures [--only NAME,...] [--seeds 3] [--quick] [--config toy] [--folder runs/figures] [--jobs 2]

A figure names the jobs it needs; a job is a run of train.py, or a part of one done again with other settings, and what
is measured of it afterwards. Equal jobs are done once. What is finished is only read, so the command can be stopped and
given again. Results: bench/results/figures/NAME.json and .svg, and FIGURES.md made of them.
"""
