"""What a method keeps of the dense model's answers, and what it saves.

- `data`       questions about pictures, with right answers
- `scoring`    whether an answer is right
- `batches`    prepared questions put together, padded on the left
- `run`        every method and budget on the same samples, batch after batch
- `store`      finished batches on disk, so that an interrupted run goes on
- `bootstrap`  how sure the figures are
- `figures`    the figures of a run, by name
- `gates`      conditions on them
- `table`      the tables and the JSON object
"""
