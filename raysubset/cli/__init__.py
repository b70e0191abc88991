"""The command line: only this package reads argv and prints."""

from raysubset.cli.commands import call, main, run_comparison_job, run_job, run_sweep_job
