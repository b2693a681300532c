"""One process of a training run for the tests: `training_run.py RECIPE.json [lm [UPDATE]]`; leaves its state beside
the output. With an UPDATE it ends there, as by kill -9."""

import os
import signal
import sys

import torch

from modeling_encodec.training.configuration import load_config
from modeling_encodec.training.lm_configuration import load_lm_config
from modeling_encodec.training.lm_trainer import LMTrainer
from modeling_encodec.training.trainer import CodecTrainer


def main(recipe: str, kind: str = "codec", killed_at: str = "-1") -> None:
    trainer = LMTrainer(load_lm_config(recipe)) if kind == "lm" else CodecTrainer(load_config(recipe))
    one_update = trainer.one_update

    def one_update_or_the_end(batch: dict) -> dict:
        if trainer.update == int(killed_at):
            os.kill(os.getpid(), signal.SIGKILL)
        return one_update(batch)

    trainer.one_update = one_update_or_the_end
    trainer.train()
    state = trainer.learner.state_dict() if kind == "lm" else trainer.codec.state_dict()
    torch.save(state, trainer.folder / f"rank{trainer.accelerator.process_index}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
