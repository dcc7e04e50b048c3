"""What a config will need before it runs: memory of a GPU, FLOPs, time. `fastpref plan`.

shapes → trace → memory and speed → changes; work says which tokens meet, devices what there is.
"""
