"""Measures what each optimization gains on this machine.

`experiment` says what is compared, `comparison` lets the variants take turns, `timing` and
`training_runs` take the samples, `statistics` and `validity` judge them, `result` stores them.
"""
