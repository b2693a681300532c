"""One process of a training run for the tests: `training_run.py RECIPE.json`; leaves its state beside the output."""

import sys

import torch

from modeling_encodec.training.configuration import load_config
from modeling_encodec.training.trainer import CodecTrainer


if __name__ == "__main__":
    torch.set_num_threads(1)
    trainer = CodecTrainer(load_config(sys.argv[1]))
    trainer.train()
    torch.save(trainer.codec.state_dict(), trainer.folder / f"rank{trainer.accelerator.process_index}.pt")
