"""Where the time of a configured run goes, and what to do about it.

`run_parts` builds the run, `step_clock` and `phases` divide its steps, `kernels` and `roofline`
look into them, `ceilings` and `advice` say what holds it back, `profile` does it all and writes it
down.
"""
