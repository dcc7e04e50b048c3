"""Effects and costs of Reward Calibration (arXiv:2604.18239) in training a small model.

    python -m benchmarks.calibration --data PAIRS.jsonl [--out benchmarks/results/calibration.json]
    python -m benchmarks.calibration --data PAIRS.jsonl --overhead
    python -m benchmarks.calibration --data PAIRS.jsonl --sketch MODEL
    python -m benchmarks.calibration --data PAIRS.jsonl --objectives cpo

For each seed the rows are shuffled and split, and a small Llama with random weights learns the
chosen responses (SFT). From there each objective trains with and without calibration for one epoch.
The result file records the position of the incentives in the Disentanglement Band during training,
and the final changes of log-probs, on training pairs and on held-out ones. With the final models of
the first seed, `one_step` compares the band's prediction with a small step of gradient descent.

`--overhead` measures the cost of calibration instead, and `--sketch` the error of the sketches of a
pretrained model's scores. Each leaves the other parts of the result file unchanged.
"""
