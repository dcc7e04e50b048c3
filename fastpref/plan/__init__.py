"""`fastpref plan`: predict the GPU memory, FLOPs and time of a config before it runs.

workload          forward passes of each step, from the lengths of the data
model_shapes      the model on the meta device, and its numbers of parameters
activation_trace  bytes and FLOPs of the trunk, counted on fake tensors
head, memory      peak memory of a rank, by part
flops, devices    FLOPs of a step, and the time they take
predict           all of it, for one config
suggestions       changes of a config that make it fit
command           the command line
"""
