"""The incentive–score view of training: the Disentanglement Band, Reward Calibration, DPO-PG."""
