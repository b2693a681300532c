"""Two processes that train on GPUs learn what one learns, and hold the same bits."""

import types

import torch
from conftest import make_model, noise
from devices import REAL, gpu_or_pretended, moved
from peers import in_processes
from run_results import assert_equal
from torch import distributed

from modeling_encodec.models.configuration_encodec import EncodecConfig
from modeling_encodec.training.codec_update import CodecUpdate
from modeling_encodec.training.configuration import TrainingConfig


SMALL = {"num_filters": 4, "hidden_size": 16, "num_lstm_layers": 1, "codebook_size": 64}


def updates(rank: int, world: int) -> dict:
    """Losses and state after three updates, of which each of `world` processes does its share."""

    def reduce(values, reduction):
        total = values.clone()
        distributed.all_reduce(total)
        return total / world if reduction == "mean" else total

    about = {"device": torch.device("cuda"), "num_processes": world, "process_index": rank, "reduce": reduce}
    accelerator = types.SimpleNamespace(**about, autocast=lambda: torch.autocast("cuda", enabled=False))
    config = TrainingConfig(segment_seconds=0.1, discriminator_filters=4, discriminator_chance=1.0, batch_size=4)
    with gpu_or_pretended():
        model = make_model(EncodecConfig.preset_24khz(**SMALL, target_bandwidths=[0.9, 1.8])).to("cuda").train()
        torch.manual_seed(0)
        update = CodecUpdate(model, config, accelerator)
        share, losses = 4 // world, []
        for number in range(3):
            audio = noise(4, 1, 2400, seed=number)[rank * share : (rank + 1) * share].to("cuda")
            if number == 0:
                update.start_codebooks([audio])
            losses.append(update.run(audio, number))
        return {"losses": losses, "state": moved(update.state_dict(), "cpu")}


def work_of_two(rank: int) -> dict:
    return updates(rank, 2)


def test_two_are_equal_and_like_one(tmp_path):
    first, second = in_processes(work_of_two, tmp_path)
    assert_equal(first, second)
    alone = updates(0, 1)
    for ours, single in zip(first["losses"], alone["losses"], strict=True):
        for name, value in single.items():
            assert abs(ours[name] - value) <= (0.1 if REAL else 0.02) * max(abs(value), 0.05), name
