"""The demonstration that ``make demo`` runs: fine-tune a small encoder on four tasks, then merge.

In the order of the data: :mod:`corpus` (text from the standard library) -> :mod:`tasks` (labelled
examples) -> :mod:`encoder` (the model and its accuracy) -> :mod:`train` (fine-tunes) ->
:mod:`recipes` (what to merge, and the call of ``shardmerge merge``) -> :mod:`report` (the table);
:mod:`steps` does it all.
"""
