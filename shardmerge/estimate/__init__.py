"""What some merge methods read beside a model: ordinary checkpoints with its tensors' names.

    stand_ins     Fisher information without data: squared task vectors, Adam's second moments
    examples      files of text as tokens: which examples, and what a task asks of them
    tensors       the tensors of a checkpoint that a model's parameters are
    models        a transformers model for a task
    counting      how many examples are done, for people
    saved         sums over examples, so that a run that was stopped goes on
    sums          sums of squared gradients, on one device
    fisher        diagonal Fisher information, from the command to the output
    fisher_zero3  sums of a model that no single device holds (DeepSpeed ZeRO-3)
    gram          Gram matrices of the inputs of linear layers

Those that run a model need transformers, which nothing else of shardmerge does.
"""
