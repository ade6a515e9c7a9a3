"""Tables of training runs: compared settings, each with several seeds; the runs, their results, tables and plots."""
