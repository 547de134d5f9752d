"""Benchmarks: plain scripts that print JSON lines and, at the end, a short table.

    python -m benchmarks.families        make the inputs (the others do so too, when needed)
    python -m benchmarks.bench_merge     wall, CPU, memory and bytes, against a plain copy
    python -m benchmarks.bench_peers     the same recipe in mergekit: compared, then timed
    python -m benchmarks.bench_memory    peak memory against the budget

Files in reading order: checkpoint (one model on disk), families (base and fine-tunes), recipes,
harness (run a command, measure it, report), plain (the read and write to beat), compare (two
outputs), mergekit (the peer), then the scripts. Every script takes ``--family tiny``, which runs in
seconds and measures nothing of worth: it is there to test the scripts.
"""
