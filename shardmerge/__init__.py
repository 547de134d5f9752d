"""shardmerge: merge model checkpoints, tile by tile, in constant memory.

A recipe becomes a plan, a plan is many tasks, a task reads a tile of every model, runs one kernel
and writes one byte range of the output; when all ranges are there, the index is published. The
files, in the order of the data:

    merge       the whole path in a few lines (prepare: what is known before anything runs)
    recipe      WHAT: YAML to a frozen Recipe, and the method of each tensor (recipe_*: its grammar)
    header      the safetensors format; the only file that knows it
    sources     FROM: a checkpoint as a map from names to tensors, whatever it is on disk
                (hf, torch_bin, zero, dcp; pickles, zips, torch_file: torch's format, nothing run)
    match       which input tensors make each output tensor (parts, layers, inputs, extras,
                mismatch: its steps; matrices: what a tensor holds for methods that see matrices as
                a whole)
    layout      where every element of the output goes: shards, headers, parts
    plan        HOW: tasks, what each reads, keeps in memory and writes (memory: the sizes)
    excerpt     what a worker needs of a plan for its tasks
    execute     RUN: which task next, what is durable, when to stop
    work        one task: read a tile, run a kernel, write a tile (runs: the passes of a tensor,
                whole: of one that is seen by matrices; window, decode, summaries)
    records     what became of each task: where, when, how long, how much memory
    ledger      which parts are written and what was decided
    outputs     TO: places that a checkpoint is published at: parts, journal, lock, names
    staging     OUT before it is published: is it free, what is there already
    publish     SHOW: check coverage, name the shards, write the index last (assets: small files)
    methods     one file per merge method
    kernels     a method's arithmetic, compiled to native loops and to CUDA
    stores      places that bytes are read from: ranges, checked and repeated
    executors   places to run tasks: threads here, a Ray cluster (placement, node: its decisions)
    slices      the same merge as an array of jobs that never talk to each other
    kept        sums of task vectors that are kept, and the models that are made of them
    continual   models that arrive one at a time (state: what is in it, steps: what a step is)
    computed    checkpoints that one process computes, published as merges are
    estimate    what methods read beside a model: Fisher information and Gram matrices, from data,
                and what stands in for them without
    extract     the LoRA adapter of a model against its base (choice, names: which layers and how
                PEFT calls them; deltas, decompose, finished: matrix after matrix; report)
    architectures  what a config tells of a model: task, head, how weights are stored
    numerics    dtypes, random numbers, exact sums, checksums
    errors      every exception
    verify, diff, report, describe, progress: looking at checkpoints and runs
    arguments, console, cli, cli_estimate: the command line
"""

__version__ = "0.1.0"
