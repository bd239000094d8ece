"""`make demo`, in the order of its stages: run, predict, check, resume, report."""

import trainer  # noqa: F401  # its filters keep megatron-core's import quiet, whatever comes first here
