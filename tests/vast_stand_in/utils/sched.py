def get_lr_sched(global_step, opts):
    return 1.0 - global_step / (2 * opts.num_train_steps)
