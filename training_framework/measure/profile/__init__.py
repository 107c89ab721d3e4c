"""Where the time of a configured run goes, and what to do about it.

`run_parts` builds the run, `step_clock` and `phases` divide its steps, `trace` and `roofline` look
into them, `ceilings` and `advice` say what limits the run, `profile` combines all of this and
writes the files.
"""
