"""Measuring what each optimization is worth on this machine.

`experiment` says what is compared, `comparison` lets the variants take turns, `timing` and
`training_runs` take the samples, `statistics` and `validity` judge them, `result` keeps them.
"""
