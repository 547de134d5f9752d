"""Does merging one model after another work on real ones? ``python -m benchmarks.quality``.

The demonstration's encoder, fine-tuned on eight tasks, is merged in several orders, one model at a
time, and all at once. In the order of the data: :mod:`corpus` and :mod:`tasks` (labelled examples)
-> the demonstration's fine-tuning -> :mod:`candidates` (methods, and the parameters to choose from)
-> :mod:`commands` (the calls of ``shardmerge``) -> :mod:`figures` (what accuracies come to) ->
:mod:`report` and :mod:`plot`; :mod:`steps` does it all.
"""
