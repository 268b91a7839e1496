"""Tables and plots of records, as one HTML page or as Markdown: the `couplings report` command.

`reading` finds the records that belong together, `significance` says which rows of a table are not worse than the best,
`couplings_part` and `training_part` make sections of them, `figures` draws, and `pages` writes.
"""
