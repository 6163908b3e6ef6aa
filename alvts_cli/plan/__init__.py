"""What a keep ratio will bring on a machine, by calculation: no weights, no card.

- `cards`     machines as data: what they reach at most, and the share of it assumed
- `shape`     the numbers of a model that a prediction needs, for the known ones as data
- `describe`  those numbers of any model of a known family, counted on tensors without numbers
- `work`      what every phase of a generation asks of a machine
- `roofline`  how long that takes, and what binds
- `predict`   dense and selective, phase by phase, and the longest batch
- `machine`   the ceilings of the machine at hand, measured
- `report`    the tables and the JSON object

Only `describe` and `machine` load torch.
"""
