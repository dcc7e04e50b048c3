"""`fastpref bench`: the ops beside the plain products they cannot do without, and beside peers.

    rows         what is measured, as data, and its inputs
    peers        who is measured: named callables, each imported when it is first called
    truth        errors against fp64
    timer        seconds, and memory on a GPU
    memory       memory on a CPU, in a process of its own
    report       JSON, table, picture
    environment  what else a figure depends on
    run          all of it in order

Every row goes one way on every device: `run.Bench.measure`.
"""
