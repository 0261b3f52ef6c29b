"""MIDAS against the test vectors of methods.md 2.10, slow loops, and the properties named there."""

import dataclasses
import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from tests.training.toys import (
    F1,
    F2,
    START,
    make_batch,
    random_batch,
    tiny_method,
    tiny_model,
    vector_batch,
    vector_midas,
)
from training.batch import Batch, Progress
from training.distributed import reduce_sums
from training.methods import MidasConfig, midas, misalign, pairing
from training.methods.midas import Midas, resolve
from training.methods.pairing import Pairs, Pool

TOLERANCE = {"atol": 1e-6, "rtol": 0.0}
PARTNER_A, PARTNER_B, PARTNER_C = (1, 2, 3, 0), (2, 3, 0, 1), (1, 0, 3, 2)


def close(actual, expected) -> None:
    actual = torch.as_tensor(actual, dtype=torch.float64).detach()
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=torch.float64), **TOLERANCE)


@pytest.fixture
def fix_partners(monkeypatch):
    """fix_partners(table): every draw returns this table of partners, (G,) or (G, J)."""

    def fix(table) -> None:
        partner_GJ = torch.as_tensor(table).reshape(len(table), -1)

        def draw(pool: Pool, uniform_GJ, kind, fused_RC):
            same = pool.label_G[partner_GJ[:, 0]] == pool.label_G
            valid_G = torch.ones_like(same) if kind == "permutation" else ~same
            return partner_GJ[pool.own_R], valid_G

        monkeypatch.setattr(midas, "draw_partners", draw)

    return fix


@dataclass
class Seen:
    """What a step computed per misaligned sample."""

    pairs: Pairs | None = None
    share: Tensor | None = None
    log_probability: Tensor | None = None
    hard: Tensor | None = None
    similarity: Tensor | None = None
    loss: Tensor | None = None


@pytest.fixture
def seen(monkeypatch) -> Seen:
    """Records the inner values of the last step; they are computed by the code under test."""
    seen = Seen()

    def make_pairs(*args):
        seen.pairs = pairing.make_pairs(*args)
        return seen.pairs

    def hard_weight(similarity, kind):
        seen.similarity = similarity
        return misalign.hard_weight(similarity, kind)

    def loss(alpha, share, log_probability, hard):
        seen.share, seen.log_probability, seen.hard = share, log_probability, hard
        seen.loss = misalign.misaligned_loss(alpha, share, log_probability, hard)
        return seen.loss

    monkeypatch.setattr(midas, "make_pairs", make_pairs)
    monkeypatch.setattr(midas, "hard_weight", hard_weight)
    monkeypatch.setattr(midas, "misaligned_loss", loss)
    return seen


def step(method: Midas, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and sums of one step without optimizer; alpha moves."""
    output = method(batch, START)
    sums = reduce_sums(output.sums)
    method.after_step(sums, START)
    return output.loss, sums


def mean_mis(sums: dict[str, Tensor]) -> Tensor:
    return sums["loss_mis"] / (sums["n_valid"] * len(sums["s_sum"]))


# Vector A


def test_vector_a_terms_per_sample(fix_partners, seen):
    fix_partners(PARTNER_A)
    method = vector_midas()
    loss, sums = step(method, vector_batch())

    close(sums["loss_align"] / 4, 0.582198)
    close(sums["loss_uni"] / 4, 1.490637)
    close(
        seen.share.reshape(8, 2)[:, 0],
        [0.596165, 0.619684, 0.484424, 0.623468, 0.623468, 0.425192, 0.619684, 0.652190],
    )
    close(seen.share.sum(dim=-1), torch.ones(2, 4))
    probability = seen.log_probability.exp().reshape(8, 2)
    close(
        probability[:, 0],
        [0.589648, 0.489713, 0.333333, 0.556976, 0.556976, 0.310424, 0.489713, 0.605611],
    )
    close(
        probability[:, 1],
        [0.145406, 0.362788, 0.333333, 0.137349, 0.137349, 0.379152, 0.362788, 0.122271],
    )
    close(
        misalign.share(probability)[:, 0],
        [0.802184, 0.574443, 0.5, 0.802184, 0.802184, 0.450166, 0.574443, 0.832018],
    )
    close(
        seen.similarity.flatten(),
        [0, -0.707107, 0, 0.707107, 0, 0.707107, 0, -0.707107],
    )
    close(seen.hard.flatten(), [1.5, 1.146447, 1.5, 1.853553, 1.5, 1.853553, 1.5, 1.146447])
    close(
        seen.loss.flatten(),
        [1.874003, 1.037710, 1.817844, 2.338958, 1.892817, 2.161886, 1.357731, 1.380550],
    )
    close(sums["conf_uni"] / 8, [0.580534, 0.419466])
    close(sums["conf_multi"] / 8, [0.667203, 0.332797])
    close(mean_mis(sums), 1.732687)
    close(loss, 3.805523)
    close(sums["loss_sum"] / sums["rows"], 3.805523)
    close(method.alpha, [1.0, 1.25])
    assert method.weak == 1


def test_vector_a_confidences():
    method, batch = vector_midas(), vector_batch()
    logits = method.model.unimodal_logits(batch.inputs)
    close(misalign.confidence(logits["one"], batch.label), [0.665241, 0.665241, 1 / 3, 0.665241])
    close(misalign.confidence(logits["two"], batch.label), [0.401760, 0.450627, 0.408275, 0.354770])


@pytest.mark.parametrize(
    ("config", "alpha", "expected_mis", "expected_total"),
    [
        ({}, (1, 1.2), 1.732687, 3.805523),
        ({}, (1, 1.25), 1.779039, 3.851874),
        ({"weak_modality_weighting": False}, (1, 1), 1.547282, 3.620117),
        ({"hard_sample_weighting": False}, (1, 1.2), 1.145730, 3.218565),
        (
            {"weak_modality_weighting": False, "hard_sample_weighting": False},
            (1, 1),
            1.023237,
            3.096072,
        ),
        ({"lambda_mis": 5}, (1, 1.2), 1.732687, 10.736272),
        ({"variant": "official_code"}, (1, 1.2), 1.732687, 3.060204),
    ],
)
def test_vector_a_switch_table(config, alpha, expected_mis, expected_total, fix_partners):
    fix_partners(PARTNER_A)
    method = vector_midas(**config)
    method.alpha.copy_(torch.tensor(alpha))
    loss, sums = step(method, vector_batch())
    close(mean_mis(sums), expected_mis)
    close(loss, expected_total)
    if not method.config.weak_modality_weighting:
        close(method.alpha, [1, 1])


def test_vector_a_official_ratios(fix_partners):
    fix_partners(PARTNER_A)
    method = vector_midas(variant="official_code")
    _, sums = step(method, vector_batch())
    close(sums["raw_uni"][0] / sums["raw_uni"][1], 1.441755)
    close(sums["raw_multi"][:, 0] / sums["raw_multi"][:, 1], [2.012177, 1.959667])
    close(method.alpha, [1.0, 1.25])


GRADIENT_W1 = [[-0.106554, 0.150856], [0.212038, -0.167736], [-0.105485, 0.016880]]
ATTACHED_W1 = [[-0.211976, 0.182273], [0.281852, -0.268906], [-0.069876, 0.086633]]


def test_vector_a_gradients(fix_partners):
    fix_partners(PARTNER_A)
    method, batch = vector_midas(), vector_batch()
    method(batch, START).loss.backward()
    close(method.model.heads["one"].weight.grad, GRADIENT_W1)
    close(method.model.fusion.bias.grad, [0.133645, -0.351926, 0.218281])
    close(
        batch.inputs["one"].grad,
        [
            [-0.057587, 0.057587],
            [0.092099, -0.092099],
            [0.115105, -0.115105],
            [0.097710, -0.097710],
        ],
    )
    close(
        batch.inputs["two"].grad,
        [
            [-0.067174, -0.007191],
            [0.075078, -0.118879],
            [0.022529, 0.071101],
            [0.078560, -0.125177],
        ],
    )


def test_attached_confidences_would_be_seen(fix_partners, seen):
    """The wrong stop points give the other gradient of methods.md; ours is not that one."""
    fix_partners(PARTNER_A)
    method, batch = vector_midas(), vector_batch()
    method(batch, START)
    slow_loss(method, batch, seen.pairs, attached=True).total.backward()
    close(method.model.heads["one"].weight.grad, ATTACHED_W1)

    method.zero_grad()
    method(batch, START).loss.backward()
    gap = method.model.heads["one"].weight.grad - torch.tensor(ATTACHED_W1)
    assert gap.abs().max() > 0.05


def test_warmup_loss_of_paper_and_release():
    for variant, expected in (("paper", 1.490637), ("official_code", 0.745319)):
        method = vector_midas(variant=variant, warmup_epochs=1)
        output = method(vector_batch(), START)
        close(output.loss, expected)
        assert "loss_mis" not in output.sums


# Vector B: rows 1 and 3 have partners with their own label


def test_vector_b_invalid_rows_are_dropped(fix_partners, seen):
    fix_partners(PARTNER_B)
    method = vector_midas()
    loss, sums = step(method, vector_batch())
    close(seen.loss[:, [0, 2]], [[1.568987, 2.130774], [2.130774, 1.568987]])
    assert sums["n_valid"] == 2
    close(mean_mis(sums), 1.849881)
    close(loss, 3.922716)
    close(sums["conf_uni"][1] / 4, 0.463429)
    close(sums["conf_multi"][1] / 4, 0.415906)
    close(method.alpha, [1.0, 1.25])


def test_vector_b_all_rows_kept(fix_partners, seen):
    fix_partners(PARTNER_B)
    method = vector_midas(pairing="permutation")
    loss, sums = step(method, vector_batch())
    close(
        seen.loss.flatten(),
        [1.568987, 0.994254, 2.130774, 0.856079, 2.130774, 0.856079, 1.568987, 0.994254],
    )
    close(mean_mis(sums), 1.387523)
    close(loss, 3.460358)
    close(sums["conf_uni"][1] / 8, 0.419626)
    close(sums["conf_multi"][1] / 8, 0.457953)
    close(method.alpha, [1.0, 1.15])


def test_vector_b_official_code(fix_partners):
    fix_partners(PARTNER_B)
    method = vector_midas(variant="official_code")
    loss, _ = step(method, vector_batch())
    close(loss, 2.715040)
    close(method.alpha, [1.0, 1.15])


# Vector C: two groups of two rows; each row has at most one possible partner, so the draw is real


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (slice(0, 2), [7.533640, 2.439266, 1.560734, 3.208736, 0.791264, 1.25]),
        (slice(2, 4), [6.351149, 2.208216, 1.791784, 2.148885, 1.851115, 1.15]),
    ],
)
def test_vector_c_each_rank_alone(keep, expected):
    method = vector_midas()
    _, sums = step(method, vector_batch(keep=keep))
    got = [sums["loss_mis"], *sums["conf_uni"], *sums["conf_multi"], method.alpha[1]]
    close(torch.stack(got), expected)


def test_vector_c_groups_of_one_batch(seen):
    method = vector_midas(pair_groups=2)
    loss, sums = step(method, vector_batch())
    assert seen.pairs.source_SRM[0, :, 1].tolist() == list(PARTNER_C)
    close(sums["loss_mis"], 13.884789)
    close(sums["conf_uni"] / 8, [0.580935, 0.419065])
    close(sums["conf_multi"] / 8, [0.669703, 0.330297])
    close(loss, 3.808434)
    close(method.alpha, [1.0, 1.25])


def test_vector_c_group_without_valid_pair():
    method = vector_midas(pair_groups=2)
    loss, sums = step(method, vector_batch(label=(0, 0, 2, 1)))
    assert sums["n_valid"] == 2
    close(mean_mis(sums), 1.587787)
    close(loss, 4.710623)
    close([sums["conf_uni"][1] / 4, sums["conf_multi"][1] / 4], [0.447946, 0.462779])
    close(method.alpha, [1.0, 1.15])


# Vector D: three modalities


def test_vector_d_three_modalities():
    confidence_SRM = torch.tensor([[[0.6, 0.3, 0.1]]], dtype=torch.float64)
    share = misalign.share(confidence_SRM)
    close(share, [[[0.6, 0.3, 0.1]]])
    logits = torch.tensor([[[0.70, 0.20, 0.05, 0.05]]], dtype=torch.float64).log()
    log_probability = misalign.label_log_probability(logits, torch.tensor([[[0, 1, 2]]]))
    multi = misalign.share(log_probability.exp())
    close(multi, [[[0.736842, 0.210526, 0.052632]]])

    slot = torch.tensor([[[0, 1, 2]]])
    cosine = torch.tensor([[[1.0, 0.5, -0.25]]], dtype=torch.float64)
    likeness = misalign.mean_over_replaced(cosine, slot)
    close(likeness, [[0.125]])
    hard = misalign.hard_weight(likeness, "cosine")
    close(hard, [[1.5625]])
    alpha = torch.tensor([1, 1, 1.1], dtype=torch.float64)
    close(misalign.misaligned_loss(alpha, share, log_probability, hard), [[1.603698]])

    direction = misalign.share_step(share[0, 0], multi[0, 0])
    weak = share[0, 0].argmin()
    close(misalign.next_alpha(alpha, weak, direction, 0.05, "reset", None), [1, 1, 1.15])


# Slow loops, written from the formulas alone


@dataclass
class Slow:
    total: Tensor
    conf_uni: list[float]
    conf_multi: list[float]


def slow_loss(method: Midas, batch: Batch, pairs: Pairs, attached: bool = False) -> Slow:
    """L_total of methods.md 2.2 and 2.4 by loops over samples; sources come from `pairs`."""
    keep = (lambda t: t) if attached else (lambda t: t.detach())
    names = method.model.modalities
    features = method.model.encode(batch.inputs)
    p = {m: g.softmax(-1) for m, g in method.model.unimodal_logits(features).items()}
    p_fused = method.model.fuse(features).softmax(-1)
    count, label = len(batch.label), batch.label.tolist()
    total = torch.zeros((), dtype=torch.float64)
    for i in range(count):
        total = total - p_fused[i, label[i]].log() / count
        total = total - sum(p[m][i, label[i]].log() for m in names) / count
    terms, uni, multi = [], [], []
    for source_RM in pairs.source_SRM.tolist():
        for i, a in enumerate(source_RM):
            if not bool(pairs.valid_R[i]):
                continue
            mixed = {m: features[m][[j]] for m, j in zip(names, a, strict=True)}
            p_mixed = method.model.fuse(mixed).softmax(-1)[0]
            c = [keep(p[m][j, label[j]]) for m, j in zip(names, a, strict=True)]
            hat = [p_mixed[label[j]] for j in a]
            cosines = [
                keep(torch.dot(features[m][i], features[m][j]))
                / keep(features[m][i].norm() * features[m][j].norm())
                for m, j in zip(names, a, strict=True)
                if j != i
            ]
            h = 1 + (sum(cosines) / len(cosines) + 1) / 2
            cross = sum(
                alpha * c_m / sum(c) * -hat_m.log()
                for alpha, c_m, hat_m in zip(method.alpha.tolist(), c, hat, strict=True)
            )
            terms.append(h * cross)
            uni.append([float((x / sum(c)).detach()) for x in c])
            multi.append([float((x / sum(hat)).detach()) for x in hat])
    if terms:
        total = total + method.config.lambda_mis * sum(terms) / len(terms)
    columns = [
        [sum(column) / max(len(terms), 1) for column in zip(*x, strict=True)] for x in (uni, multi)
    ]
    return Slow(total, *columns)


def slow_alpha(alpha: list[float], uni: list[float], multi: list[float]) -> list[float]:
    """methods.md 2.2 items 4 and 5 with the reset rule."""
    weak = uni.index(min(uni))
    delta = (uni[weak] > multi[weak]) - (uni[weak] < multi[weak])
    return [max(1.0, a + 0.05 * delta) if m == weak else 1.0 for m, a in enumerate(alpha)]


@pytest.mark.parametrize("num_modalities", [2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_matches_slow_loops(num_modalities, seed, seen):
    method = tiny_method("midas", num_modalities, lambda_mis=2.0, pair_groups=1 + seed % 2).double()
    alpha = torch.linspace(1, 1.3, num_modalities).roll(seed)
    method.alpha.copy_(alpha)
    batch = random_batch(seed, 9, num_modalities, dtype=torch.float64)
    loss, sums = step(method, batch)
    gradients = torch.autograd.grad(loss, list(method.parameters()))
    moved = method.alpha.clone()

    method.alpha.copy_(alpha)
    slow = slow_loss(method, batch, seen.pairs)
    expected = torch.autograd.grad(slow.total, list(method.parameters()))
    close(loss, slow.total)
    for got, want in zip(gradients, expected, strict=True):
        close(got, want)
    samples = sums["n_valid"] * num_modalities
    close(sums["conf_uni"] / samples, slow.conf_uni)
    close(sums["conf_multi"] / samples, slow.conf_multi)
    close(moved, slow_alpha(alpha.tolist(), slow.conf_uni, slow.conf_multi))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kinetics", [False, True])
def test_ratio_step_matches_the_released_branches(seed, kinetics):
    """methods.md 3.1 rows 5-7 and 12, spelled out with floats."""
    generator = torch.Generator().manual_seed(seed)
    uni = torch.rand(2, generator=generator)
    multi = torch.rand(2, 2, generator=generator)
    (u1, u2), (a, b) = uni.tolist(), multi.tolist()
    uni_ratio, mm_ratio = u1 / u2, (a[0] / a[1] + b[0] / b[1]) / 2
    if uni_ratio > 1:
        up = mm_ratio > uni_ratio
    elif kinetics:
        up = (a[1] / a[0] + b[1] / b[0]) / 2 > uni_ratio
    else:
        up = mm_ratio < uni_ratio
    assert misalign.ratio_step(uni, multi, kinetics) == (1 if up else -1)


# Pairing


def pool_of(label, group=None) -> Pool:
    label = torch.as_tensor(label)
    group = torch.zeros_like(label) if group is None else torch.as_tensor(group)
    return Pool(label, group, torch.arange(len(label)), counts=None)


def draw(pool: Pool, num_partners: int, seed: int, kind="mismatch", fused=None):
    fused = torch.zeros(len(pool.label_G), 3) if fused is None else fused
    uniform = pairing.draw_uniforms(pool.group_G, num_partners, Progress(seed, 0, 0, 1))
    return pairing.draw_partners(pool, uniform, kind, fused)


@pytest.mark.parametrize(
    ("pair_groups", "expected"),
    [(1, [0] * 6), (2, [0, 0, 0, 1, 1, 1]), (3, [0, 0, 0, 1, 2, 2]), (4, [0, 0, 1, 2, 3, 3])],
)
def test_pair_groups_are_runs_of_lanes(pair_groups, expected):
    lane = [0, 0, 1, 2, 3, 3]
    pool = pairing.make_pool(make_batch({}, range(6), lane, num_lanes=4), pair_groups)
    assert pool.group_G.tolist() == expected


def test_uniforms_of_a_group_depend_on_nothing_outside_it():
    group = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    uniform = pairing.draw_uniforms(group, 3, START)
    assert uniform.shape == (8, 3)
    assert len(uniform.unique()) == 24
    for rest in ([2], [0, 0, 2], [3, 2, 1, 2, 2, 0, 3], [2, 2, 0]):
        other = torch.tensor(rest)
        alone = pairing.draw_uniforms(other, 3, START)[other == 2]
        rows = min(len(alone), 3)
        assert torch.equal(alone[:rows], uniform[5 : 5 + rows])
    expected = torch.rand(3, 3, generator=START.generator("pair", 2), dtype=torch.float64)
    assert torch.equal(uniform[5:], expected)
    assert pairing.draw_uniforms(group[:0], 3, START).shape == (0, 3)


def test_partners_of_a_group_depend_on_nothing_outside_it():
    label, group = [0, 1, 2, 0, 1, 2, 1], [0, 0, 0, 0, 1, 1, 1]
    alone, _ = draw(pool_of(label[:4], group[:4]), 2, 0)
    both, _ = draw(pool_of(label, group), 2, 0)
    assert torch.equal(both[:4], alone)


def test_distinct_numbers_of_every_possible_draw():
    """One draw per cell of the unit cube: each of the 24 ordered triples below 4 comes once."""
    cells = torch.cartesian_prod(*[(torch.arange(n) + 0.5) / n for n in (4.0, 3.0, 2.0)])
    triples = pairing.distinct_numbers(cells.double(), torch.full((24,), 4))
    assert sorted(map(tuple, triples.tolist())) == list(itertools.permutations(range(4), 3))


def test_distinct_numbers_by_hand():
    uniform = torch.tensor([0.5, 0.99, 0.0, 0.7], dtype=torch.float64).repeat(6, 1)
    numbers = pairing.distinct_numbers(uniform, torch.tensor([0, 1, 2, 3, 4, 10]))
    assert numbers.tolist() == [
        [0, 0, 0, 0],
        [0, 0, 0, 0],
        [1, 0, 1, 0],
        [1, 2, 0, 1],
        [2, 3, 0, 1],
        [5, 9, 0, 6],
    ]
    below_one = torch.full((1, 3), math.nextafter(1, 0), dtype=torch.float64)
    assert pairing.distinct_numbers(below_one, torch.tensor([3])).tolist() == [[2, 1, 0]]


@pytest.mark.parametrize("num_partners", [1, 2, 3])
def test_mismatch_partners_have_another_label_in_the_same_group(num_partners):
    label = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 1, 1, 1, 1])
    group = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
    pool = pool_of(label, group)
    for seed in range(20):
        partner, valid = draw(pool, num_partners, seed)
        assert valid.tolist() == [True] * 9 + [False] * 3
        assert (label[partner[valid]] != label[valid][:, None]).all()
        assert (group[partner[valid]] == group[valid][:, None]).all()
        assert all(len(set(row)) == num_partners for row in partner[:6].tolist())
        assert partner[6].tolist() == [8] * num_partners  # the only candidate, repeated


def test_mismatch_partners_are_uniform():
    pool = pool_of([0, 0, 1, 1, 2, 2, 2])
    draws = 4000
    partners = torch.stack([draw(pool, 2, seed)[0] for seed in range(draws)])
    for i, label in enumerate(pool.label_G.tolist()):
        candidates = (pool.label_G != label).nonzero().flatten()
        for column in range(2):
            counts = torch.bincount(partners[:, i, column], minlength=7)[candidates]
            expected = draws / len(candidates)
            chi_square = ((counts - expected) ** 2 / expected).sum()
            assert counts.sum() == draws
            assert chi_square < 25  # 4 degrees of freedom: p < 1e-4


@pytest.mark.parametrize("kind", ["mismatch", "confusion"])
def test_partners_in_a_large_batch(kind):
    """Every row of 4096, against sets made by hand."""
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(30, (4096,), generator=generator)
    group = torch.randint(3, (4096,), generator=generator)  # in no order
    label[group == 2] = 7
    fused = torch.randn(4096, 30, generator=generator)
    partner, valid = draw(pool_of(label, group), 3, 0, kind, fused)
    assert torch.equal(valid, group != 2)
    rows_of: dict[tuple[int, int], set[int]] = {}
    for row, key in enumerate(zip(group.tolist(), label.tolist(), strict=True)):
        rows_of.setdefault(key, set()).add(row)
    top_two = fused.topk(2, dim=1).indices.tolist()
    for row in valid.nonzero().flatten().tolist():
        own, where = int(label[row]), int(group[row])
        wanted = [c for c in range(30) if c != own]
        if kind == "confusion":
            wanted = [c for c in top_two[row] if c != own][:1]
        candidates = set().union(*(rows_of[where, c] for c in wanted))
        chosen = set(partner[row].tolist())
        assert len(chosen) == 3
        assert chosen <= candidates


def test_permutation_stays_in_its_groups_and_moves_rows():
    group = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    fixed = 0
    for seed in range(50):
        partner, valid = draw(pool_of([0] * 7, group), 2, seed, "permutation")
        assert valid.all()
        for column in partner.T:
            assert sorted(column.tolist()) == list(range(7))
            assert (group[column] == group).all()
            fixed += int((column == torch.arange(7)).sum())
    assert 130 < fixed < 270  # one fixed point expected per group: 200


def test_confusion_prefers_the_best_wrong_class_of_the_top_two():
    label = [0, 0, 0, 1, 2, 2]
    fused = torch.tensor(
        [[1.0, 3, 2], [3, 1, 2], [0, 0, 9], [0, 9, 1], [5, 1, 9], [9, 8, 0]]
    )  # wrong class: 1, 2, 2, 2, 0, 0
    for seed in range(20):
        partner, valid = draw(pool_of(label), 1, seed, "confusion", fused)
        assert valid.all()
        assert torch.tensor(label)[partner[:, 0]].tolist() == [1, 2, 2, 2, 0, 0]
    absent = fused.roll(1, dims=1)
    labels_seen = set()
    for seed in range(20):  # nobody has class 1 here: row 4 prefers it, and falls back to others
        partner, valid = draw(pool_of([0, 0, 0, 0, 2, 2]), 1, seed, "confusion", absent)
        assert valid.all()
        assert (
            torch.tensor([0, 0, 0, 0, 2, 2])[partner[:, 0]] != torch.tensor([0, 0, 0, 0, 2, 2])
        ).all()
        labels_seen.add(int(partner[4, 0]))
    assert len(labels_seen) > 1


def test_confusion_repeats_the_only_row_of_the_class_and_stays_in_the_group():
    fused = torch.tensor([[1.0, 3, 2]]).repeat(6, 1)  # everybody is confused with 1, class 1 with 2
    label, group = [0, 0, 1, 2, 0, 2], [0, 0, 0, 0, 1, 1]
    for seed in range(20):
        partner, valid = draw(pool_of(label, group), 2, seed, "confusion", fused)
        assert valid.all()
        assert partner.tolist() == [[2, 2], [2, 2], [3, 3], [2, 2], [5, 5], [4, 4]]


def test_cyclic_slots_are_the_shifts_of_the_order():
    order = torch.tensor([[2, 0, 1], [0, 1, 2]])
    slot = pairing.cyclic_slots(order)
    for r in range(2):
        shifts = {tuple(((order[r] + k) % 3).tolist()) for k in range(3)}
        assert {tuple(slot[s, r].tolist()) for s in range(3)} == shifts
        assert [int(slot[s, r, s]) for s in range(3)] == [0, 0, 0]
    both = pairing.cyclic_slots(torch.tensor([[0, 1], [1, 0]]))
    assert both.tolist() == [[[0, 1], [0, 1]], [[1, 0], [1, 0]]]  # directions A and B


def test_random_orders_are_permutations(seen):
    method = tiny_method("midas", 3, perms_per_sample=5)
    loss, sums = step(method, random_batch(0, 8, 3))
    slot = seen.pairs.slot_SRM
    assert slot.shape == (5, 8, 3)
    assert (slot.sort(dim=-1).values == torch.arange(3)).all()
    assert len({tuple(row) for row in slot.reshape(-1, 3).tolist()}) > 3
    assert sums["s_sum"].shape == (5,)
    assert not [name for name in method.epoch_metrics(sums) if name.startswith("hard/s_mean_kept/")]
    torch.testing.assert_close(
        loss.double(), (sums["loss_align"] + sums["loss_uni"]) / 8 + mean_mis(sums)
    )


def test_draws_follow_seed_epoch_and_step(seen):
    method, batch = tiny_method("midas"), random_batch(0, 16)
    sources = []
    for progress in (
        START,
        START,
        Progress(0, 0, 1, 1),
        Progress(1, 0, 0, 1),
        Progress(0, 1, 0, 2),
    ):
        method(batch, progress)
        sources.append(seen.pairs.source_SRM.tolist())
    assert sources[0] == sources[1]
    assert all(sources[0] != other for other in sources[2:])


# Properties


def test_equal_labels_give_no_misaligned_loss_and_leave_alpha():
    method = vector_midas()
    loss, sums = step(method, vector_batch(label=(1, 1, 1, 1)))
    assert sums["loss_mis"] == 0
    close(loss, (sums["loss_align"] + sums["loss_uni"]) / 4)
    close(method.alpha, [1, 1.2])
    assert method.weak == -1
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in method.parameters())
    assert method.epoch_metrics(sums)["train/loss_mis"] == 0


def test_lambda_zero_is_aligned_plus_unimodal():
    loss, sums = step(vector_midas(lambda_mis=0), vector_batch())
    close(loss, 0.582198 + 1.490637)


def test_lambda_leaves_the_unimodal_heads_alone():
    gradients = {}
    for lambda_mis in (0.0, 5.0):
        method = tiny_method("midas", 3, lambda_mis=lambda_mis)
        method(random_batch(0, 12, 3), START).loss.backward()
        gradients[lambda_mis] = {n: p.grad.clone() for n, p in method.named_parameters()}
    for name, grad in gradients[0.0].items():
        assert torch.equal(grad, gradients[5.0][name]) == (".heads." in name), name


@given(
    shares=st.lists(st.tuples(*[st.floats(0.01, 1)] * 6), min_size=1, max_size=40),
    cap=st.sampled_from([None, 1.1]),
    flip=st.sampled_from(["reset", "carry", "keep"]),
)
@settings(max_examples=50, deadline=None)
def test_alpha_stays_in_its_range(shares, cap, flip):
    alpha = torch.ones(3, dtype=torch.float64)
    for values in shares:
        uni, multi = torch.tensor(values[:3]), torch.tensor(values[3:])
        direction = misalign.share_step(uni, multi)
        alpha = misalign.next_alpha(alpha, uni.argmin(), direction, 0.05, flip, cap)
        assert (alpha >= 1).all()
        assert (alpha <= (cap or math.inf)).all()
        assert flip == "keep" or (alpha > 1).sum() <= 1


def test_what_happens_to_alpha_when_another_modality_becomes_weak():
    alpha, weak, up = torch.tensor([1.0, 1.5, 1.0]), torch.tensor(0), torch.tensor(1.0)
    for flip, expected in (
        ("reset", [1.05, 1, 1]),
        ("keep", [1.05, 1.5, 1]),
        ("carry", [1.55, 1, 1]),
    ):
        close(misalign.next_alpha(alpha, weak, up, 0.05, flip, None), torch.tensor(expected))
    close(misalign.carried_alpha(alpha, weak), torch.tensor([1.5, 1, 1]))
    tie = misalign.share_step(torch.tensor([0.4, 0.6]), torch.tensor([0.4, 0.6]))
    assert tie == 0


def test_carried_alpha_weights_the_modality_weak_in_this_batch(fix_partners):
    """Same number at the other modality: the current batch decides where it goes (3.1 row 13)."""
    fix_partners(PARTNER_A)
    method = vector_midas(variant="official_code")
    method.alpha.copy_(torch.tensor([1.2, 1.0]))
    loss, _ = step(method, vector_batch())
    close(loss, 3.060204)
    close(method.alpha, [1.0, 1.25])


def test_permuting_modalities_permutes_every_output(monkeypatch):
    order = [2, 0, 1]
    results = []
    slots = pairing.cyclic_slots(torch.tensor([[0, 1, 2], [2, 0, 1], [1, 0, 2]] * 3))
    partners = torch.tensor([[(i + 1) % 9, (i + 4) % 9] for i in range(9)])
    batch = dataclasses.replace(
        random_batch(3, 9, 3, dtype=torch.float64), label=torch.arange(9) % 3
    )
    for chosen in ([0, 1, 2], order):
        model = tiny_model(3)
        model.modalities = tuple(f"m{i}" for i in chosen)
        with torch.no_grad():
            parts = model.fusion.weight.split(4, dim=1)
            model.fusion.weight.copy_(torch.cat([parts[i] for i in chosen], dim=1))
        valid = torch.ones(9, dtype=torch.bool)
        monkeypatch.setattr(midas, "draw_partners", lambda *_, v=valid: (partners, v))
        monkeypatch.setattr(midas, "draw_slots", lambda *_, c=chosen: slots[:, :, c])
        method = Midas(model, MidasConfig(warmup_epochs=0)).double()
        method.alpha.copy_(torch.tensor([1.0, 1.1, 1.4])[chosen])
        loss, sums = step(method, batch)
        results.append((loss, sums["conf_uni"], sums["conf_multi"], method.alpha))
    close(results[1][0], results[0][0])
    for plain, permuted in zip(results[0][1:], results[1][1:], strict=True):
        close(permuted, plain[order])


def test_input_level_mixing_equals_feature_level_without_batch_statistics():
    """A deterministic encoder gives a swapped input the same feature: the gradients agree."""
    gradients = []
    for mix_level in ("feature", "input"):
        method = tiny_method("midas", 3, mix_level=mix_level).double()
        loss = method(random_batch(1, 10, 3, dtype=torch.float64), START).loss
        gradients.append(torch.autograd.grad(loss, list(method.parameters())))
    for feature, raw in zip(*gradients, strict=True):
        close(raw, feature)


def test_l2_similarity_weight(fix_partners, seen):
    fix_partners(PARTNER_A)
    step(vector_midas(similarity="l2"), vector_batch())
    distance_a = [math.dist(F2[i], F2[j]) for i, j in enumerate(PARTNER_A)]
    distance_b = [math.dist(F1[i], F1[j]) for i, j in enumerate(PARTNER_A)]
    close(seen.hard, [[1 + 1 / (1 + d) for d in distance_a], [1 + 1 / (1 + d) for d in distance_b]])


def test_mean_similarity_by_the_modality_kept(fix_partners):
    fix_partners((3, 3, 0, 0))  # row 1 has its own label as partner: left out
    method = vector_midas()
    _, sums = step(method, vector_batch())
    metrics = method.epoch_metrics(sums)
    near = math.sqrt(0.5)
    assert metrics["hard/s_mean_kept/one"] == pytest.approx(near)  # of F2: rows 0-3, 2-0, 3-0
    assert metrics["hard/s_mean_kept/two"] == pytest.approx(-near / 3)
    assert metrics["hard/s_mean"] == pytest.approx(near / 3)


def test_large_alpha_is_told_once_on_rank_zero(monkeypatch, caplog):
    def epoch(method: Midas) -> int:
        caplog.clear()
        _, sums = step(method, vector_batch())
        method.epoch_metrics(sums)
        return len(caplog.records)

    method = vector_midas(eta=0)
    method.alpha.copy_(torch.tensor([1.0, 10.0]))
    assert epoch(method) == 0
    method.alpha[1] = 10.05
    assert epoch(method) == 1
    assert "alpha of modality two is 10.05" in caplog.text
    assert epoch(method) == 0
    other = vector_midas(eta=0)
    other.alpha[1] = 11
    monkeypatch.setattr(midas, "rank", lambda: 1)
    assert epoch(other) == 0


def test_epoch_metrics_names_and_values(fix_partners):
    fix_partners(PARTNER_A)
    method = vector_midas()
    _, first = step(method, vector_batch())
    method.weak.fill_(0)  # as if another modality had been weak: one flip
    _, second = step(method, vector_batch())
    metrics = method.epoch_metrics({name: first[name] + second[name] for name in first})
    expected = {
        "train/loss_align": 0.582198,
        "train/loss_uni": 1.490637,
        "train/loss_mis": (1.732687 + 1.779039) / 2,
        "hard/s_mean": 0.0,
        "hard/s_mean_kept/one": 0.0,
        "hard/s_mean_kept/two": 0.0,
        "alpha/one": 1.0,
        "alpha/two": 1.3,
        "alpha_mean/one": 1.0,
        "alpha_mean/two": 1.275,
        "alpha_flips": 1.0,
        "conf_uni/one": 0.580534,
        "conf_uni/two": 0.419466,
        "conf_multi/one": 0.667203,
        "conf_multi/two": 0.332797,
    }
    assert metrics == pytest.approx(expected, abs=1e-6)


def test_half_precision_features_are_judged_in_float32():
    """bfloat16 model: softmax, logarithms and sums are float32 or wider, so shares add up to 1."""
    method = tiny_method("midas").bfloat16()
    method.alpha = method.alpha.double()
    output = method(random_batch(0, 32, dtype=torch.bfloat16), START)
    assert output.loss.dtype == torch.float32
    assert output.sums["conf_uni"].sum() == pytest.approx(64, abs=1e-4)


# Configuration


def test_variant_decides_what_is_left_open():
    paper, code = resolve(MidasConfig()), resolve(MidasConfig(variant="official_code"))
    names = ("pairing", "uni_reduction", "alpha_stat", "alpha_flip")
    assert [getattr(paper, n) for n in names] == ["mismatch", "sum", "mean_of_ratios", "reset"]
    assert [getattr(code, n) for n in names] == ["permutation", "mean", "ratio_of_means", "carry"]
    mixed = resolve(MidasConfig(variant="official_code", pairing="mismatch", eta=0.1))
    assert (mixed.pairing, mixed.alpha_flip, mixed.eta) == ("mismatch", "carry", 0.1)


def test_bad_configurations_are_refused():
    with pytest.raises(ValidationError, match="Extra inputs"):
        MidasConfig(lamda=1)
    with pytest.raises(ValidationError, match="perms_per_sample=0 must be at least 1"):
        MidasConfig(perms_per_sample=0)
    with pytest.raises(ValidationError, match="kinetics_ratio_test=True changes nothing"):
        MidasConfig(kinetics_ratio_test=True)
    with pytest.raises(ValueError, match="defined for 2 modalities, the data has 3"):
        tiny_method("midas", 3, variant="official_code")
