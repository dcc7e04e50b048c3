"""`fastpref bench`: time, memory and errors of the ops against bare GEMMs and other libraries.

    problems     ops and shapes to measure, and their inputs
    contestants  implementations: named callables, each imported when it is first called
    accuracy     errors against fp64
    timer        seconds, and memory on a GPU
    memory       memory on a CPU, in a process of its own
    report       JSON, table, picture
    runner       the command: all of it in order

`runner.Bench.measure` measures every row on every device.
"""
