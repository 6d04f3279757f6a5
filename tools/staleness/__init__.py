"""The staleness study: grids of training runs, their results, tables and plots.

A *level* is a module of this package that trains: `toy` in one process, `stack` with real engines.  It offers

    check(cell)     raises ConfigError where the settings of a cell are not ones that this level knows
    open_level()    a context manager, entered once by every worker process, that gives run(cell) -> result

A cell is a flat dict with everything that is needed to repeat the run: "level", "algorithm" (a label), "overrides"
(dotted keys of the section [algorithm] and their values) and settings of the level, among them "seed",
"learning_rate" and what the columns of a table are, such as "N".  A result is a dict of numbers:

    start, best, final   success rates in [0, 1], all evaluated in the same way
    history              at most about 50 dicts: update, success, reward, log_w_mean, log_w_std, ess, phi_mean, ...
    wall_s, cpu_s        seconds; the second where the level knows it
"""
