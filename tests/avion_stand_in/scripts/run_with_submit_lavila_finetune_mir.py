import argparse
import os

import scripts.main_lavila_finetune_mir as main_lavila_finetune_mir
import submitit


class Trainer:
    def __init__(self, args):
        self.args = args

    def __call__(self):
        import scripts.main_lavila_finetune_mir as main_lavila_finetune_mir

        main_lavila_finetune_mir.main(self.args)

    def checkpoint(self):
        return submitit.helpers.DelayedSubmission(type(self)(self.args))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(parents=[main_lavila_finetune_mir.get_args_parser()])
    parser.add_argument("--job_dir")
    args = parser.parse_args()
    os.makedirs(args.output_dir, exist_ok=True)
    executor = submitit.LocalExecutor(folder=args.job_dir)
    executor.update_parameters(timeout_min=5)
    job = executor.submit(Trainer(args))
    job.wait()
    print(job.stdout(), job.stderr(), sep="\n")
    job.result()
