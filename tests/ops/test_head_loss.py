"""token_loss: single sweep = two sweeps = naive, with and without a reference, in either layout."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srft_jax.ops.head import Reference, ReferencedStats, TokenStats, token_loss
from srft_jax.ops.head_passes import HeadOptions, HeadTileSizes, make_layout

pytestmark = pytest.mark.usefixtures("quick_compilation")

N, D, V = 13, 8, 300  # no tile of 128 columns divides V
TRAINED = np.arange(N) % 3 != 0


class Rows(NamedTuple):
    """What the objective reads of a token."""

    targets: jax.Array
    loss_mask: jax.Array
    weight: jax.Array


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def problem(seed=0, dtype=np.float32):
    """Parameters (hidden, head), a reference's, and rows."""
    random = np.random.default_rng(seed)
    arrays = [random.normal(size=size).astype(dtype) for size in ((N, D), (D, V)) * 2]
    rows = Rows(
        random.integers(0, V, N).astype(np.int32),
        TRAINED,
        random.normal(size=(N, 3)).astype(np.float32),
    )
    return arrays[:2], arrays[2:], rows


def objective(stats, rows):
    """Not linear in the log-prob, so that its slopes must come from the statistics."""
    a, b, c = rows.weight.T
    loss = a * jnp.exp(stats.logprob) + b * stats.entropy + 0.3 * stats.logprob**2
    if isinstance(stats, ReferencedStats):
        loss += c * stats.kl + 0.1 * (stats.logprob - stats.reference_logprob) ** 2
    return loss


def naive(params, reference, rows, temperature, softcap):
    def logp(hidden, head):
        z = hidden @ head
        z = z if softcap is None else softcap * jnp.tanh(z / softcap)
        return jax.nn.log_softmax(z / temperature)

    def at_target(logp):
        return jnp.take_along_axis(logp, rows.targets[:, None], axis=1)[:, 0]

    p = logp(*params)
    stats = TokenStats(at_target(p), -(jnp.exp(p) * p).sum(axis=1))
    if reference is not None:
        q = logp(*reference)
        stats = ReferencedStats(*stats, at_target(q), (jnp.exp(p) * (p - q)).sum(axis=1))
    stats = jax.tree.map(lambda x: jnp.where(rows.loss_mask, x, 0.0), stats)
    return jnp.where(rows.loss_mask, objective(stats, rows), 0.0).sum(), stats


def ours(params, reference, rows, temperature, softcap, **options):
    other = None if reference is None else Reference(*reference)
    return token_loss(
        *params, rows, objective, temperature=temperature, softcap=softcap, reference=other,
        **options,
    )  # fmt: skip


def evaluate(function, inputs, temperature=0.7, softcap=None, **options):
    """((loss, stats), gradients by hidden and head)."""
    function = functools.partial(function, temperature=temperature, softcap=softcap, **options)
    return jax.jit(jax.value_and_grad(function, has_aux=True))(*inputs)


def assert_close(got, want):
    def check(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)

    jax.tree.map(check, jax.tree.leaves(got), jax.tree.leaves(want))


ROUTES = {  # bytes for logits, and the fewest rows that are worth keeping
    "kept, one row tile": (2**20, 1),
    "kept, five tiles of three rows": (4 * V * 3 * 8 // 7 + 8, 1),
    "computed again, tiles of two rows": (4 * V * 3 * 8 // 7 + 8, 512),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("has_reference", [False, True])
@pytest.mark.parametrize("softcap", [pytest.param(None, marks=pytest.mark.slow), 3.0])
def test_every_route_equals_the_naive_loss(route, has_reference, softcap):
    logits_bytes, least_kept_rows = ROUTES[route]
    tile_sizes = HeadTileSizes(least_kept_rows=least_kept_rows, most_columns=128)
    params, reference, rows = problem()
    inputs = (params, reference if has_reference else None, rows)
    options = HeadOptions(softcap, False, logits_bytes, tile_sizes=tile_sizes)
    layout = make_layout(N, V, 1, options)
    assert layout.keep == route.startswith("kept")
    assert (layout.rows < N) == (route != "kept, one row tile")
    want = evaluate(naive, inputs, softcap=softcap)
    memory = dict(logits_bytes=logits_bytes, tile_sizes=tile_sizes)
    got = evaluate(ours, inputs, softcap=softcap, **memory)
    assert abs(want[0][0]) > 1
    assert_close(got, want)


@pytest.mark.parametrize("has_reference", [False, True])
def test_a_loss_that_needs_all_statistics_first(has_reference):
    """Not elementwise: the objective sees all rows at once, here a mean over them."""
    params, reference, rows = problem()
    inputs = (params, reference if has_reference else None, rows)
    assert_close(evaluate(ours, inputs, elementwise=False), evaluate(naive, inputs))


@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize("has_reference", [False, True])
def test_a_head_stored_transposed(elementwise, has_reference):
    """The same numbers, and the gradient in the layout of the head."""
    (hidden, head), (other, other_head), rows = problem()
    plain = evaluate(
        ours, ((hidden, head), (other, other_head) if has_reference else None, rows),
        elementwise=elementwise,
    )  # fmt: skip
    turned = evaluate(
        ours, ((hidden, head.T), (other, other_head.T) if has_reference else None, rows),
        elementwise=elementwise, transposed=True,
    )  # fmt: skip
    aux, (d_hidden, d_head) = turned
    assert_close((aux, [d_hidden, d_head.T]), plain)


@pytest.mark.parametrize("elementwise", [False, True])
def test_a_frozen_head_gets_no_gradient(elementwise):
    """Loss, statistics and the other gradient are the same, for one unit less of work."""
    params, _, rows = problem()
    options = dict(elementwise=elementwise, logits_bytes=2**24)
    aux, (d_hidden, _) = evaluate(ours, (params, None, rows), **options)
    frozen_aux, (frozen_d_hidden, none) = evaluate(
        ours, (params, None, rows), frozen=True, **options
    )
    assert_close((frozen_aux, frozen_d_hidden), (aux, d_hidden))
    assert not none.any()

    def products(frozen):
        def loss(hidden):
            return ours((hidden, params[1]), None, rows, 0.7, None, frozen=frozen, **options)[0]

        return str(jax.make_jaxpr(jax.grad(loss))(params[0])).count("dot_general[")

    assert products(True) == products(False) - 1


def test_statistics_and_reference_take_no_gradient():
    params, reference, rows = problem()

    def total(params, reference):
        _, stats = ours(params, reference, rows, 1.0, None)
        return sum(jnp.sum(x) for x in stats)

    assert not any(np.any(x) for x in jax.tree.leaves(jax.grad(total)(params, reference)))
    grads = jax.grad(lambda reference: ours(params, reference, rows, 1.0, None)[0])(reference)
    assert not any(np.any(x) for x in jax.tree.leaves(grads))


def test_a_policy_has_no_divergence_from_itself():
    params, _, rows = problem()
    _, stats = ours(params, params, rows, 1.0, None)
    np.testing.assert_allclose(stats.kl, 0.0, atol=2e-6)
    np.testing.assert_allclose(stats.logprob, stats.reference_logprob, rtol=1e-6)


@pytest.mark.parametrize("elementwise", [False, True])
def test_no_trained_row_gives_zero(elementwise):
    params, _, rows = problem()
    rows = rows._replace(loss_mask=np.zeros(N, bool))
    (loss, stats), grads = evaluate(ours, (params, None, rows), elementwise=elementwise)
    assert loss == 0 and not any(np.any(x) for x in jax.tree.leaves((stats, grads)))


def test_losses_of_masked_rows_are_not_counted():
    params, _, rows = problem()
    broken = rows._replace(weight=np.where(TRAINED[:, None], rows.weight, np.nan))
    assert_close(evaluate(ours, (params, None, broken)), evaluate(ours, (params, None, rows)))


def test_the_loss_can_be_scaled_and_added_to():
    params, _, rows = problem()

    def total(params):
        return 3.0 * ours(params, None, rows, 1.0, None)[0] + jnp.sum(params[0])

    plain = jax.grad(lambda params: ours(params, None, rows, 1.0, None)[0])(params)
    scaled = jax.grad(total)(params)
    assert_close(scaled, [3.0 * plain[0] + 1.0, 3.0 * plain[1]])


def test_masked_rows_are_never_computed():
    """NaN in masked rows changes nothing, also where they fill the last row tile."""
    (hidden, head), _, rows = problem()
    rows = rows._replace(loss_mask=np.arange(N) >= 9)  # two tiles of three rows
    hidden[:9] = np.nan
    (loss, stats), (d_hidden, d_head) = evaluate(
        ours,
        ([hidden, head], None, rows),
        logits_bytes=4 * V,
        tile_sizes=HeadTileSizes(most_rows=3),
    )
    assert np.isfinite(loss) and np.all(np.isfinite(d_head)) and np.any(d_hidden[9:])
    assert not np.any(d_hidden[:9]) and not np.any(stats.logprob[:9])


def test_layout_follows_the_budget():
    def layout(mib, num_rows=4096, vocab_size=151_936, num_heads=1):
        options = HeadOptions(None, False, mib * 2**20)
        cut = make_layout(num_rows, vocab_size, num_heads, options)
        return cut.rows, cut.columns, cut.keep

    assert layout(512) == (512, 1024, True)
    assert layout(64) == (4096, 1024, False)
    assert layout(512, num_heads=2) == (4096, 1024, False)  # 386 rows of two policies
    assert layout(64, vocab_size=4096) == (512, 1024, True)
    assert layout(64, num_rows=1024, vocab_size=16_384) == (256, 1024, True)
    assert layout(64, num_rows=64) == (64, 1024, True)  # the only row tile, so worth keeping
    assert layout(16) == (4096, 256, False)
    assert layout(1) == (512, 128, False)
