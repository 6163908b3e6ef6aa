"""Measuring dense against selective generation, side by side in one process.

- `timing`     one generation, with its phases timed
- `inputs`     a prompt of a wanted size, without a processor
- `measure`    dense and selective runs in turn
- `statistics` medians, quartiles, the interval of a ratio
- `launches`   what a GPU would be asked to launch, counted without one
- `metrics`    the figures by name, and gates on them
- `report`     the table and the JSON file
- `decode`     tokens per second at growing batches
- `planned`    what `alvts plan` says, beside what was measured
- `suite`      a whole table by one command, with `tracing` and `markdown`
- `baseline`   comparing with an earlier JSON file
"""
