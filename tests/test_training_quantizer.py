"""The quantiser in training: gradients, codebooks that learn, start and come back, in one process and in two."""

import copy

import pytest
import torch
from conftest import noise
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import import_encodec, in_processes

from modeling_encodec.conversion.key_mapping import from_original
from modeling_encodec.models.configuration_encodec import EncodecConfig
from modeling_encodec.models.quantization_encodec import EncodecResidualVectorQuantizer, codebook_usage, kmeans


def make_quantizer(stages: int = 3, size: int = 16, dim: int = 8, seed: int = 0) -> EncodecResidualVectorQuantizer:
    bits = (size - 1).bit_length()
    config = EncodecConfig(hidden_size=dim, codebook_size=size, target_bandwidths=[(75 * bits * stages + 1) / 1000])
    torch.manual_seed(seed)
    quantizer = EncodecResidualVectorQuantizer(config)
    for stage, layer in enumerate(quantizer.layers):
        layer.codebook.start(0.6**stage * torch.randn(size, dim), 1 + 9 * torch.rand(size))
    assert len(quantizer.layers) == stages
    return quantizer


def draw(batch: int, dim: int, frames: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, dim, frames, generator=torch.Generator().manual_seed(seed))


def buffers(quantizer: EncodecResidualVectorQuantizer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}


# ---- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["latents", "commitment", "upstream"])
@pytest.mark.parametrize("name", ["24khz", "48khz"])
def test_every_encoder_parameter_learns_through_the_quantizer(name, path, small_models):
    model = copy.deepcopy(small_models[name]).train()
    output = model.quantizer(model.encoder(noise(2, model.config.audio_channels, 3200)), upstream=path == "upstream")
    values = output.latents if path == "latents" else output.commitment_losses
    (values * noise(1, 1, values.numel()).view(values.shape)).sum().backward()
    for parameter_name, parameter in model.encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, parameter_name
    assert all(buffer.grad is None for buffer in model.quantizer.buffers())


@pytest.mark.parametrize("upstream", [False, True])
def test_commitment_of_each_stage_reaches_the_latents(upstream):
    quantizer, latents = make_quantizer(), draw(2, 8, 20).requires_grad_()
    output = quantizer(latents, upstream=upstream)
    for stage, loss in enumerate(output.commitment_losses):
        (gradient,) = torch.autograd.grad(loss, latents, retain_graph=True)
        if upstream and stage > 0:
            assert (gradient == 0).all()
        else:  # of the mean of |x - q|^2, where q is all that the stages so far have coded
            expected = 2 * (latents.detach() - quantizer.decode(output.codes[: stage + 1])) / latents.numel()
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-8)
            assert gradient.abs().max() > 0


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 30)),
    stages=st.integers(1, 4),
    size=st.integers(2, 40),
    used=st.integers(1, 4) | st.none(),
    upstream=st.booleans(),
)
def test_forward_is_encode_and_decode_with_the_gradient_straight_through(shape, stages, size, used, upstream):
    batch, dim, frames = shape
    quantizer, latents = make_quantizer(stages, size, dim), draw(batch, dim, frames).requires_grad_()
    before = buffers(quantizer)
    output = quantizer(latents, used, upstream=upstream)
    count = min(used or stages, stages)
    codes = quantizer.encode(latents.detach(), num_quantizers=count)
    assert torch.equal(output.codes, codes) and output.codes.shape == (count, batch, frames)
    torch.testing.assert_close(output.latents.detach(), quantizer.decode(codes), rtol=1e-5, atol=1e-5)
    weight = draw(*shape, seed=1)
    assert torch.equal(torch.autograd.grad((output.latents * weight).sum(), latents)[0], weight)
    residual = latents.detach()
    for stage in range(count):
        rows = residual.transpose(1, 2).reshape(-1, dim)
        flat = codes[stage].flatten()
        one_hot = torch.nn.functional.one_hot(flat, size).float()
        torch.testing.assert_close(output.statistics.residuals[stage], rows, rtol=1e-5, atol=1e-5)
        assert torch.equal(output.statistics.counts[stage], one_hot.sum(0))
        torch.testing.assert_close(output.statistics.sums[stage], one_hot.t() @ rows, rtol=1e-4, atol=1e-4)
        residual = residual - quantizer.layers[stage].codebook.decode(codes[stage]).transpose(1, 2)
        assert output.commitment_losses[stage].item() == pytest.approx(residual.square().mean().item(), rel=1e-4)
    assert all(torch.equal(before[name], tensor) for name, tensor in buffers(quantizer).items())


# ---- the original ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0, 2])
def test_training_equal_to_the_original(threshold):
    """With its default threshold too: what it does for dead codes is overwritten in the same step."""
    quantization = import_encodec("encodec.quantization") or pytest.skip("the encodec package is not installed")
    ours = make_quantizer(stages=3, size=32)
    ours.layers[0].codebook.cluster_size[:5] = 0.5  # below the original's threshold
    original = quantization.ResidualVectorQuantizer(
        8, 3, 32, kmeans_init=False, threshold_ema_dead_code=threshold
    ).train()
    names = dict(zip(_our_names(original), original.state_dict()))
    original.load_state_dict({names[name]: tensor for name, tensor in buffers(ours).items()})
    for step in range(10):
        used = (3, 1, 2)[step % 3]
        latents = [draw(2, 8, 30, step).requires_grad_() for _ in range(2)]
        output = ours(latents[0], used, upstream=True)
        quantized, codes, losses = original.vq(latents[1], n_q=used)
        assert torch.equal(output.codes, codes)
        torch.testing.assert_close(output.latents, quantized, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(output.commitment_losses, losses.flatten(), rtol=1e-5, atol=1e-6)
        weight = draw(2, 8, 30, 100 + step)
        for values, commitment in ((output.latents, output.commitment_losses), (quantized, losses)):
            ((values * weight).mean() + commitment.mean()).backward()
        torch.testing.assert_close(latents[0].grad, latents[1].grad, rtol=1e-4, atol=1e-7)
        ours.update_codebooks([output.statistics], dead_code_threshold=0)
        state = {name: original.state_dict()[theirs] for name, theirs in names.items()}
        torch.testing.assert_close(buffers(ours), state, rtol=1e-4, atol=1e-5)


def _our_names(original) -> list[str]:
    renamed = from_original({f"quantizer.{name}": tensor for name, tensor in original.state_dict().items()})
    return [name.removeprefix("quantizer.") for name in renamed]


# ---- k-means start -----------------------------------------------------------------------------------------------


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_kmeans_finds_clusters():
    centres = 100 * draw(1, 4, 8).squeeze(0).t()  # (8, 4)
    vectors = (centres[:, None] + 0.01 * torch.randn(8, 50, 4, generator=seeded(1))).flatten(0, 1)
    centroids, counts = kmeans(vectors, 64, 20, seeded(2))
    distances = torch.cdist(centroids.double(), centres.double())
    assert distances.min(1).values.max() < 0.1 and (distances < 0.1).any(0).all()
    assert counts.sum() == 400
    assert torch.equal(counts.view(1, -1) @ (distances < 0.1).float(), torch.full((1, 8), 50.0))
    # As many centroids as clusters, one drawn from each: their means.
    one_each = next(seed for seed in range(5000) if len(set((_first(400, 8, seed) // 50).tolist())) == 8)
    centroids, counts = kmeans(vectors, 8, 2, seeded(one_each))
    order = (_first(400, 8, one_each) // 50).argsort()
    torch.testing.assert_close(centroids[order], vectors.view(8, 50, 4).mean(1), rtol=0, atol=1e-3)
    assert (counts == 50).all()


def _first(vectors: int, size: int, seed: int) -> torch.Tensor:
    return torch.randperm(vectors, generator=seeded(seed))[:size]


def test_start_is_the_seeds_and_lowers_the_error_of_every_stage():
    latents, starts = draw(4, 8, 100), []
    for seed in (1, 1, 2):
        quantizer = make_quantizer()
        quantizer.start_codebooks(latents, batches=2, generator=seeded(seed))
        starts.append(buffers(quantizer))
    assert all(torch.equal(starts[0][name], tensor) for name, tensor in starts[1].items())
    assert not torch.equal(starts[0]["layers.0.codebook.embed"], starts[2]["layers.0.codebook.embed"])
    losses = quantizer(latents).commitment_losses
    assert losses[0] < 0.6 and (losses[1:] < 0.75 * losses[:-1]).all()
    for layer in quantizer.layers:
        codebook = layer.codebook
        assert codebook.cluster_size.sum() == 200  # of one batch
        torch.testing.assert_close(codebook.embed_avg, codebook.embed * codebook.cluster_size[:, None])
        assert codebook.inited == 1


@settings(max_examples=15, deadline=None, derandomize=True)
@given(vectors=st.integers(1, 20), size=st.integers(2, 33))
def test_start_with_few_vectors(vectors, size):
    quantizer, latents = make_quantizer(2, size, 4), draw(1, 4, vectors)
    quantizer.start_codebooks(latents, iterations=3, generator=seeded(0))
    assert all(torch.isfinite(tensor).all() for tensor in buffers(quantizer).values())
    assert [layer.codebook.cluster_size.sum().item() for layer in quantizer.layers] == pytest.approx(
        [vectors] * 2, rel=0, abs=1e-3 * size
    )
    if vectors <= size:
        torch.testing.assert_close(quantizer.decode(quantizer.encode(latents)), latents, rtol=0, atol=1e-5)
    output = quantizer(latents)
    quantizer.update_codebooks([output.statistics], generator=seeded(0))
    assert all(torch.isfinite(tensor).all() for tensor in buffers(quantizer).values())


@pytest.mark.parametrize("first", [0, 1, 2])
def test_stages_before_the_first_stay(first):
    quantizer, latents = make_quantizer(), draw(4, 8, 50)
    before = buffers(quantizer)
    quantizer.start_codebooks(latents, first=first, generator=seeded(0))
    changed = {
        int(name.split(".")[1]) for name, tensor in buffers(quantizer).items() if not before[name].equal(tensor)
    }
    assert changed == set(range(first, 3))


# ---- codes that die and come back --------------------------------------------------------------------------------


def collapse(quantizer: EncodecResidualVectorQuantizer, part: float = 0.95) -> int:
    """Moves `part` of every codebook far away; how many codes are left."""
    dead = int(part * quantizer.config.codebook_size)
    for layer in quantizer.layers:
        codebook = layer.codebook
        codebook.start(torch.cat([codebook.embed[:-dead], codebook.embed[-dead:] + 1000]), codebook.cluster_size)
    return quantizer.config.codebook_size - dead


def train(quantizer: EncodecResidualVectorQuantizer, steps: int, **options) -> torch.Tensor:
    """Steps on stationary noise; how often each code was used in the last 20."""
    used = 0
    for step in range(steps):
        output = quantizer(draw(4, 8, 100, step), upstream=options.get("dead_code_threshold") == 0)
        counts = quantizer.update_codebooks([output.statistics], generator=seeded(step), **options)
        used = used + counts if step >= steps - 20 else 0
    return used


def test_collapsed_codebooks_recover():
    quantizer = make_quantizer(2, 64)
    left = collapse(quantizer)
    output = quantizer(draw(4, 8, 100))
    assert (output.statistics.counts > 0).sum(1).max() <= left
    used = train(quantizer, 600)
    assert (used > 0).float().mean(1).min() >= 0.9
    assert min(codebook_usage(used)[0]) >= 0.5 * 64
    assert max(codebook.embed.abs().max() for codebook in _codebooks(quantizer)) < 10
    for codebook in _codebooks(quantizer):  # a revived code is the mean of what it has met, like every other
        mean = codebook.embed_avg / codebook.cluster_size[:, None]
        torch.testing.assert_close(codebook.embed, mean, rtol=1e-3, atol=1e-4)


def test_without_revival_they_stay_dead():
    quantizer = make_quantizer(2, 64)
    left = collapse(quantizer)
    assert max(codebook_usage(train(quantizer, 600, dead_code_threshold=0))[1]) <= left / 64


def test_collapse_shows_in_the_counts_though_codes_are_revived():
    quantizer = make_quantizer(1, 64)
    same = torch.ones(2, 8, 50)
    for step in range(300):
        counts = quantizer.update_codebooks([quantizer(same).statistics], generator=seeded(step))
    assert codebook_usage(counts)[1] == [1 / 64]


def _codebooks(quantizer):
    return [layer.codebook for layer in quantizer.layers]


def test_revival_takes_the_least_used_and_few_at_once():
    quantizer = make_quantizer(1, 64)
    codebook = quantizer.layers[0].codebook
    counts = torch.full((64,), 50.0)
    dead = torch.tensor([3, 60, 7, 20, 21, 22, 40, 41, 42, 43])
    counts[dead] = torch.arange(10.0) * 1e-3
    codebook.start(codebook.embed + 1000 * (counts < 1)[:, None], counts)
    output = quantizer(draw(1, 8, 100))
    before = codebook.embed.clone()
    quantizer.update_codebooks([output.statistics], decay=0.999, generator=seeded(0))
    moved = (codebook.embed - before).norm(dim=1) > 100
    assert set(moved.nonzero().flatten().tolist()) == set(dead[:8].tolist())  # an eighth of 64
    rows = output.statistics.residuals[0]
    assert (
        torch.cdist(codebook.embed[dead[:8]], rows, compute_mode="donot_use_mm_for_euclid_dist").min(1).values < 1e-3
    ).all()
    assert codebook.cluster_size[dead[:8]].min() > 0.5 * codebook.cluster_size.mean()


def test_codes_in_use_are_not_replaced():
    """One code below the threshold, one above it, and all others alike: only the first one starts anew."""
    sides = [make_quantizer(1, 64) for _ in range(2)]
    counts = torch.full((64,), 50.0)
    counts[5], counts[6] = 4.5, 6.0
    for quantizer, threshold in zip(sides, (0, 0.1)):
        codebook = quantizer.layers[0].codebook
        far = 1000 * (torch.arange(64)[:, None] > 3)
        codebook.start(codebook.embed + far, counts)  # a code far away meets nothing
        output = quantizer(draw(1, 8, 320))
        quantizer.update_codebooks([output.statistics], dead_code_threshold=threshold, generator=seeded(0))
    without, revived = (quantizer.layers[0].codebook for quantizer in sides)
    assert (without.embed != revived.embed).any(1).nonzero().flatten().tolist() == [5]
    assert (without.cluster_size != revived.cluster_size).nonzero().flatten().tolist() == [5]


# ---- precision, usage, statistics --------------------------------------------------------------------------------


def test_codes_are_float32s_in_mixed_precision():
    quantizer, latents = make_quantizer(size=64), draw(2, 8, 200)
    plain = quantizer(latents)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, half = quantizer(latents), quantizer(latents.bfloat16())
        assert torch.equal(quantizer.encode(latents), plain.codes)
    rounded = quantizer(latents.bfloat16().float())
    quantizer.bfloat16()
    after = quantizer(latents)
    assert not torch.equal(plain.codes, rounded.codes)  # bfloat16 would show
    for output, expected in ((mixed, plain), (half, rounded), (after, plain)):
        assert torch.equal(output.codes, expected.codes) and torch.equal(output.latents, expected.latents)
        assert output.latents.dtype == output.commitment_losses.dtype == output.statistics.sums.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        quantizer.update_codebooks([after.statistics], generator=seeded(0))
    assert {tensor.dtype for tensor in quantizer.buffers()} == {torch.float32}


def test_usage_of_known_counts():
    counts = torch.stack(
        [torch.full((16,), 7.0), torch.eye(16)[3] * 5, torch.tensor([1.0] * 8 + [0.05] * 8), torch.zeros(16)]
    )
    perplexity, use = codebook_usage(counts)
    assert perplexity[:2] == pytest.approx([16, 1]) and 8 < perplexity[2] < 16 and perplexity[3] == 0
    assert use == [1, 1 / 16, 0.5, 0] and codebook_usage(counts, 0.01)[1] == [1, 1 / 16, 1, 0]


@pytest.mark.parametrize("threshold", [0, 0.1])
def test_statistics_of_parts_are_those_of_the_batch(threshold):
    whole, parts = make_quantizer(size=32), make_quantizer(size=32)
    collapse(whole), collapse(parts)
    for step in range(5):
        latents = draw(6, 8, 20, step)
        options = {"dead_code_threshold": threshold}
        whole.update_codebooks([whole(latents, 2).statistics], generator=seeded(step), **options)
        pieces = [parts(piece, 2).statistics for piece in latents.split([1, 3, 2])]
        parts.update_codebooks(pieces, generator=seeded(step), **options)
        torch.testing.assert_close(buffers(whole), buffers(parts), rtol=1e-4, atol=1e-5)


# ---- two processes -----------------------------------------------------------------------------------------------


def work_of_two(rank: int) -> dict[str, dict[str, torch.Tensor]]:
    """Everything in one start of the processes, which costs the most."""
    results = {}
    quantizer = make_quantizer(2, 32)
    collapse(quantizer)
    for step in range(50):
        output = quantizer(draw(2, 8, 64, 2 * step + rank))
        quantizer.update_codebooks([output.statistics], decay=0.9, generator=seeded(100 * rank + step))
    results["trained"] = buffers(quantizer)
    quantizer = make_quantizer(2, 32)
    for step in range(10):  # one process meets a single vector, fewer of them, and so few of the codes
        latents = draw(1, 8, 1).expand(1, 8, 3) if rank else draw(2, 8, 64, step)
        quantizer.update_codebooks([quantizer(latents).statistics], generator=seeded(step))
    results["uneven"] = buffers(quantizer)
    for name, generator in (("started", seeded(0)), ("started without a seed", None)):
        quantizer = make_quantizer(2, 32)
        torch.manual_seed(rank)
        quantizer.start_codebooks(draw(2, 8, 64, rank), generator=generator)
        results[name] = buffers(quantizer)
    return results


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return in_processes(work_of_two, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("name", ["trained", "uneven", "started", "started without a seed"])
def test_codebooks_of_two_processes_are_equal_to_the_bit(name, two):
    assert set(two[0]) == {"trained", "uneven", "started", "started without a seed"}
    fresh = buffers(make_quantizer(2, 32))
    for buffer, tensor in two[0][name].items():
        assert torch.equal(tensor, two[1][name][buffer]), buffer
        assert torch.isfinite(tensor).all()
        assert "inited" in buffer or not torch.equal(tensor, fresh[buffer])


def test_two_processes_learn_what_one_learns_of_both_batches(two):
    quantizer = make_quantizer(2, 32)
    collapse(quantizer)
    for step in range(50):
        latents = torch.cat([draw(2, 8, 64, 2 * step + rank) for rank in range(2)])
        quantizer.update_codebooks([quantizer(latents).statistics], decay=0.9, generator=seeded(step))
    assert max(codebook.embed.abs().max() for codebook in _codebooks(quantizer)) < 10  # revived, from both batches
    torch.testing.assert_close(two[0]["trained"], buffers(quantizer), rtol=1e-3, atol=1e-3)


def test_two_processes_start_as_one_from_both_batches(two):
    quantizer = make_quantizer(2, 32)
    quantizer.start_codebooks(torch.cat([draw(2, 8, 64, rank) for rank in range(2)]), generator=seeded(0))
    torch.testing.assert_close(two[0]["started"], buffers(quantizer), rtol=1e-4, atol=1e-4)
