"""Evaluation: metrics of one run, its result file, reports over many runs, and the diagnosis of a failed one."""
