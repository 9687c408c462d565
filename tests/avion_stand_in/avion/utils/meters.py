class AverageMeter:
    def __init__(self, name):
        self.name = name

    def update(self, value):
        self.value = value

    def synchronize(self):
        pass

    def __str__(self):
        return f"{self.name} {self.value!r}"


class ProgressMeter:
    def __init__(self, num_batches, meters, prefix=""):
        self.num_batches, self.meters, self.prefix = num_batches, meters, prefix

    def display(self, batch):
        print(f"{self.prefix}[{batch}/{self.num_batches}]", *self.meters, sep="\t")

    def synchronize(self):
        for meter in self.meters:
            meter.synchronize()
