"""Counts over compiled programs beside what can be said of them by hand."""

import jax
import jax.numpy as jnp
import pytest

from srft_jax.planning.chips import CHIPS
from srft_jax.planning.hlo.count import count_module
from srft_jax.planning.hlo.device_groups import device_group
from srft_jax.planning.hlo.parser import parse_hlo
from srft_jax.planning.phases import make_phase
from srft_jax.planning.program_costs import program_cost, trips_by_scope
from srft_jax.planning.topology import Topology

L, N, D = 5, 32, 64
PRODUCT = 2.0 * N * D * D


def counted(function, *shapes, trips=lambda op_name: pytest.fail(f"unknown loop {op_name}")):
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    text = jax.jit(function).lower(*arguments).compile().as_text()
    return count_module(parse_hlo(text), trips, 1)


def count_text(text, num_devices):
    """Work of a program's text whose loops all have a fixed range."""
    return count_module(parse_hlo(text), lambda op_name: pytest.fail(op_name), num_devices)


X, W, STACK = ((N, D), jnp.float32), ((D, D), jnp.float32), ((L, D, D), jnp.float32)


def layers(x, stack):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]


def unrolled(x, stack):
    for layer in range(L):
        x = jnp.tanh(x @ stack[layer])
    return x


def test_a_scan_counts_as_often_as_it_runs():
    assert counted(lambda x, w: jnp.tanh(x @ w), X, W).flops == PRODUCT
    assert counted(layers, X, STACK).flops == L * PRODUCT == counted(unrolled, X, STACK).flops


def test_xla_itself_counts_a_scan_once():
    """Which is why it is counted here."""
    shapes = [jax.ShapeDtypeStruct(*array) for array in (X, STACK)]
    xla_flops = jax.jit(layers).lower(*shapes).compile().cost_analysis()["flops"]
    assert PRODUCT <= xla_flops < 2 * PRODUCT


def test_a_gradient_counts_three_times_its_forward_pass():
    count = counted(jax.grad(lambda w, x: layers(x, w).sum()), STACK, X)
    # The first layer's input takes no gradient, but a scan forms it all the same.
    assert count.flops == 3 * L * PRODUCT


def test_a_loop_over_what_comes_with_the_data_runs_as_often_as_one_says():
    def repeated(x, w, n):
        with jax.named_scope("microbatches"):
            return jax.lax.fori_loop(0, n, lambda i, x: layers(x, w), x)

    shapes = (X, STACK, ((), jnp.int32))
    for times in (1, 7):
        trips = trips_by_scope({"microbatches": times}, otherwise=100)
        assert counted(repeated, *shapes, trips=trips).flops == times * L * PRODUCT
    assert (
        counted(repeated, *shapes, trips=trips_by_scope({"micro": 3}, 2)).flops == 2 * L * PRODUCT
    )


def test_the_branch_with_the_most_work_counts():
    def either(flag, x, w):
        return jax.lax.cond(flag, lambda: x @ w @ w @ w, lambda: x @ w)

    assert counted(either, ((), jnp.bool_), X, W).flops == 3 * PRODUCT


def test_a_scan_reads_each_layer_once():
    """Not the whole stack at every turn, as its operand's shape has it: that grows with L^2."""
    few, many = (counted(layers, X, ((n, D, D), jnp.float32)).hbm_bytes for n in (20, 80))
    assert 4 * 20 * D * D <= few and 3.8 * few <= many <= 4.2 * few


def test_a_stack_is_written_layer_by_layer():
    def kept(x):
        return jax.lax.scan(lambda x, _: (x + 1.0, x), x, length=200)[1]

    written = 4 * 200 * N * D
    assert written <= counted(kept, X).hbm_bytes <= 8 * written  # not 200 times


def test_an_elementwise_program_reads_and_writes_its_arrays():
    assert counted(lambda x, y: x * y + 1.0, X, X).hbm_bytes == 3 * 4 * N * D


# ---- What libtpu writes, of which this machine's XLA makes none ----

TPU = """HloModule test, is_scheduled=true

%all-reduce-scatter (p: f32[64,128]) -> f32[16,128] {
  %p = f32[64,128]{1,0:T(8,128)} parameter(0)
  %sum = f32[64,128]{1,0:T(8,128)} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%add
  %zero = s32[] constant(0)
  ROOT %part = f32[16,128]{1,0:T(8,128)} dynamic-slice(%sum, %zero, %zero), dynamic_slice_sizes={16,128}
}

ENTRY %main (a: bf16[4,7168,128], b: bf16[4,1024,128], c: f32[64,128], d: bf16[8,32]) -> f32[16,128] {
  %a = bf16[4,7168,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[4,1024,128]{2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  %c = f32[64,128]{1,0:T(8,128)} parameter(2)
  %d = bf16[8,32]{1,0:T(8,128)(2,1)} parameter(3)
  %scores = f32[4,7168,1024]{2,1,0:T(8,128)S(1)} convolution(%a, %b), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0oi->0bf
  %kernel = (bf16[8,32]{1,0}, f32[8]{0}) custom-call(%d, %d), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"cost_estimate":{"flops":"1000","transcendentals":"7","bytes_accessed":"300"}}}
  %gather-start = (bf16[8,32]{1,0}, bf16[16,32]{1,0}) all-gather-start(%d), dimensions={0}, replica_groups={{0,4},{1,5},{2,6},{3,7}}
  %gathered = bf16[16,32]{1,0} all-gather-done(%gather-start)
  ROOT %scattered = f32[16,128]{1,0:T(8,128)} fusion(%c), kind=kCustom, calls=%all-reduce-scatter
}
"""  # noqa: E501


def test_what_libtpu_writes():
    count = count_text(TPU, num_devices=8)
    assert count.flops == 2 * 4 * 7168 * 1024 * 128 + 1000
    assert count.collectives == {
        ("all-gather", (0, 4)): 2 * 8 * 32,
        ("reduce-scatter", (0, 1, 2, 3)): 4 * 64 * 128 * 3 / 4,
    }
    # The product reads a alone, as b and the scores are in fast memory; the kernel says for itself.
    a, gathered, scattered = 2 * 4 * 7168 * 128, 2 * (8 + 16) * 32, 4 * (64 + 16) * 128
    assert count.hbm_bytes == a + 300 + gathered + scattered


ASYNCHRONOUS = """%begin (p: bf16[8,32]) -> (bf16[8,32], bf16[32,32], u32[]) {
  %p = bf16[8,32]{1,0:T(8,128)(2,1)} parameter(0)
  %gather = bf16[32,32]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=23, dimensions={0}, replica_groups=[2,4]<=[8]
  ROOT %call = (bf16[8,32]{1,0}, bf16[32,32]{1,0}, u32[]{:S(2)}) custom-call(%gather), custom_call_target="AsyncCollectiveStart"
}

%step (p: bf16[8,32], q: bf16[32,32], c: u32[], x: f32[32,64], w: f32[64,64]) -> (f32[32,64], bf16[8,32], bf16[32,32], bf16[32,32], u32[]) {
  %p = bf16[8,32]{1,0:T(8,128)(2,1)} parameter(0)
  %q = bf16[32,32]{1,0:T(8,128)(2,1)} parameter(1)
  %c = u32[]{:S(2)} parameter(2)
  %x = f32[32,64]{1,0:T(8,128)} parameter(3)
  %w = f32[64,64]{1,0:T(8,128)} parameter(4)
  %y = f32[32,64]{1,0:T(8,128)} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %gather = bf16[32,32]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=23, dimensions={0}, replica_groups=[2,4]<=[8]
  ROOT %all = (f32[32,64]{1,0}, bf16[8,32]{1,0}, bf16[32,32]{1,0}, bf16[32,32]{1,0}, u32[]{:S(2)}) tuple(%y, %p, %q, %gather, %c)
}

%end (p: bf16[8,32], q: bf16[32,32], c: u32[]) -> bf16[32,32] {
  %p = bf16[8,32]{1,0:T(8,128)(2,1)} parameter(0)
  %q = bf16[32,32]{1,0:T(8,128)(2,1)} parameter(1)
  %c = u32[]{:S(2)} parameter(2)
  %gather = bf16[32,32]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=23, dimensions={0}, replica_groups=[2,4]<=[8]
  ROOT %call = bf16[32,32]{1,0:T(8,128)(2,1)} custom-call(%p, %q, %gather, %c), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: bf16[8,32], x: f32[32,64], w: f32[64,64]) -> bf16[32,32] {
  %a = bf16[8,32]{1,0:T(8,128)(2,1)} parameter(0)
  %x = f32[32,64]{1,0:T(8,128)} parameter(1)
  %w = f32[64,64]{1,0:T(8,128)} parameter(2)
  %begun = (bf16[8,32]{1,0}, bf16[32,32]{1,0}, u32[]{:S(2)}) fusion(%a), kind=kCustom, calls=%begin
  %shard = bf16[8,32]{1,0} get-tuple-element(%begun), index=0
  %whole = bf16[32,32]{1,0} get-tuple-element(%begun), index=1
  %state = u32[]{:S(2)} get-tuple-element(%begun), index=2
  %stepped = (f32[32,64]{1,0}, bf16[8,32]{1,0}, bf16[32,32]{1,0}, bf16[32,32]{1,0}, u32[]{:S(2)}) fusion(%shard, %whole, %state, %x, %w), kind=kOutput, calls=%step
  %on = bf16[32,32]{1,0} get-tuple-element(%stepped), index=2
  ROOT %ended = bf16[32,32]{1,0} fusion(%shard, %on, %state), kind=kCustom, calls=%end
}
"""  # noqa: E501


def test_a_gather_that_goes_on_beside_products_is_sent_once():
    """One fusion starts it; two more name it again, and one of these computes something else."""
    count = count_text(ASYNCHRONOUS, num_devices=8)
    shard, whole = 2 * 8 * 32, 2 * 32 * 32
    assert count.collectives == {("all-gather", (0, 1, 2, 3)): 3 * shard}
    # Shard and result in the fusion that begins it, and what the product reads and writes.
    assert count.hbm_bytes == shard + (shard + whole) + 4 * (32 * 64 + 64 * 64 + 32 * 64)
    assert count.flops == PRODUCT


PREFETCHED = """%renamed (p: f32[64,64]) -> f32[64,64] {
  %p = f32[64,64]{1,0:T(8,128)} parameter(0)
  ROOT %same = f32[64,64]{1,0:T(8,128)} bitcast(%p)
}

%product (w: f32[64,64], x: f32[32,64]) -> f32[32,64] {
  %w = f32[64,64]{1,0:T(8,128)} parameter(0)
  %x = f32[32,64]{1,0:T(8,128)S(1)} parameter(1)
  %v = f32[64,64]{1,0:T(8,128)} fusion(%w), kind=kLoop, calls=%renamed
  ROOT %y = f32[32,64]{1,0:T(8,128)S(1)} dot(%x, %v), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: f32[32,64], v: f32[256,64], w: f32[64,64]) -> f32[32,64] {
  %x = f32[32,64]{1,0:T(8,128)S(1)} parameter(0)
  %v = f32[256,64]{1,0:T(8,128)} parameter(1)
  %w = f32[64,64]{1,0:T(8,128)} parameter(2)
  %start = ((f32[256,64]{1,0:T(8,128)}), f32[64,64]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%v), slice={[0:64], [0:64]}
  %part = f32[64,64]{1,0:T(8,128)S(1)} slice-done(%start)
  %y = f32[32,64]{1,0:T(8,128)S(1)} dot(%x, %part), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %z = f32[32,64]{1,0:T(8,128)S(1)} fusion(%w, %y), kind=kOutput, calls=%product
}
"""  # noqa: E501


STACKED = """%renamed (p: f32[28,64,64]) -> f32[28,64,64] {
  %p = f32[28,64,64]{2,1,0} parameter(0)
  ROOT %same = f32[28,64,64]{2,1,0} bitcast(%p)
}

%one_layer (w: f32[28,64,64], i: s32[]) -> f32[1,64,64] {
  %w = f32[28,64,64]{2,1,0} parameter(0)
  %i = s32[]{:S(2)} parameter(1)
  %v = f32[28,64,64]{2,1,0} fusion(%w), kind=kLoop, calls=%renamed
  ROOT %part = f32[1,64,64]{2,1,0} dynamic-slice(%v, %i, %i, %i), dynamic_slice_sizes={1,64,64}
}

%all (p: f32[64,64], q: f32[64,64]) -> (f32[64,64], f32[64,64], f32[64,64]) {
  %p = f32[64,64]{1,0} parameter(0)
  %q = f32[64,64]{1,0} parameter(1)
  %n = f32[64,64]{1,0} negate(%p)
  ROOT %t = (f32[64,64]{1,0}, f32[64,64]{1,0}, f32[64,64]{1,0}) tuple(%n, %p, %q)
}

ENTRY %main (w: f32[28,64,64], i: s32[], p: f32[64,64], q: f32[64,64]) -> (f32[64,64], f32[64,64], f32[64,64]) {
  %w = f32[28,64,64]{2,1,0} parameter(0)
  %i = s32[]{:S(2)} parameter(1)
  %p = f32[64,64]{1,0} parameter(2)
  %q = f32[64,64]{1,0} parameter(3)
  %layer = f32[1,64,64]{2,1,0} fusion(%w, %i), kind=kLoop, calls=%one_layer
  ROOT %copied = (f32[64,64]{1,0}, f32[64,64]{1,0}, f32[64,64]{1,0}) fusion(%p, %q), kind=kLoop, calls=%all
}
"""  # noqa: E501


def test_a_layer_of_a_renamed_stack_is_read_and_what_a_fusion_copies_is_written():
    """A layer read and written; an array read, its negative and itself written; another copied."""
    assert count_text(STACKED, num_devices=1).hbm_bytes == (2 + 3 + 2) * 4 * 64 * 64


def test_only_the_slice_is_read_that_is_fetched_ahead():
    """A quarter of an array is read, and all of another, which an inner fusion renames."""
    count = count_text(PREFETCHED, num_devices=1)
    assert count.hbm_bytes == 4 * 64 * 64 + 4 * 64 * 64 and count.flops == 2 * PRODUCT


DOUBLED = """%condition (t: (s32[], f32[32,64])) -> pred[] {
  %t = (s32[], f32[32,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] constant(8)
  ROOT %go = pred[] compare(%i, %n), direction=LT
}

%body (t: (s32[], f32[32,64])) -> (s32[], f32[32,64]) {
  %t = (s32[], f32[32,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[32,64]{1,0} get-tuple-element(%t), index=1
  %w = f32[64,64]{1,0} constant({...})
  %y = f32[32,64]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %last = s32[] add(%next, %one)
  ROOT %out = (s32[], f32[32,64]{1,0}) tuple(%last, %y)
}

ENTRY %main (s: (s32[], f32[32,64])) -> (s32[], f32[32,64]) {
  %s = (s32[], f32[32,64]{1,0}) parameter(0)
  ROOT %loop = (s32[], f32[32,64]{1,0}) while(%s), condition=%condition, body=%body
}
"""


def test_a_loop_whose_number_rises_by_two_runs_half_as_often():
    """As libtpu doubles the bodies of loops that send parts of a product's operand around."""
    assert count_text(DOUBLED, num_devices=8).flops == 4 * PRODUCT
    single = DOUBLED.replace("tuple(%last", "tuple(%next")
    assert count_text(single, num_devices=8).flops == 8 * PRODUCT


BETWEEN_SLICES = """ENTRY %main (g: f32[4096,8,128]) -> f32[4096,8,128] {
  %g = f32[4096,8,128]{2,1,0:T(8,128)} parameter(0)
  %before = token[] after-all()
  %send = (f32[4096,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%g, %before), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}
  %sent = token[] send-done(%send), channel_id=2, is_host_transfer=true
  %recv = (f32[4096,8,128]{2,1,0:T(8,128)}, u32[], token[]) recv(%sent), channel_id=1, is_host_transfer=true
  %got = (f32[4096,8,128]{2,1,0:T(8,128)}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true
  ROOT %sum = f32[4096,8,128]{2,1,0:T(8,128)} get-tuple-element(%got), index=0
}
"""  # noqa: E501


@pytest.mark.parametrize(("slices", "sent"), [(2, 1.0), (4, 1.5)])
def test_what_slices_sum_goes_over_their_own_network(slices, sent):
    count = count_text(BETWEEN_SLICES, num_devices=8).times(3)
    size = 3 * 4 * 4096 * 8 * 128
    assert count.summed == size and not count.collectives
    phase = make_phase("train", count, Topology("v5e:2x2", CHIPS["v5e"], (2, 2), (), slices))
    assert phase.to_slices == sent * size and phase.bound == "links"
    assert phase.exchange == sent * size / 3.125e9


SPLASH = """ENTRY %main (m: s8[1,16,16], q: bf16[28,8192,128], k: bf16[4,8192,128]) -> bf16[28,8192,128] {
  %m = s8[1,16,16]{2,1,0:T(8,128)(4,1)S(1)} parameter(0)
  %q = bf16[28,8192,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %k = bf16[4,8192,128]{2,1,0:T(8,128)(2,1)} parameter(2)
  ROOT %x = bf16[28,8192,128]{2,1,0} custom-call(%m, %m, %q, %k, %k), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512, \\"block_kv\\": 512}"
}}, metadata={op_name="jit(f)/PASS_segmented_residuals/pallas_call" stack_frame_id=7}
}
"""  # noqa: E501


@pytest.mark.parametrize(
    ("name", "products"), [("splash_mha_fwd", 2), ("splash_mha_dkv", 4), ("splash_mha_dq", 3)]
)
def test_splash_attention_by_its_formula(name, products):
    """Blocks of 512 x 512 on and below the diagonal: 136 of 256."""
    count = count_text(SPLASH.replace("PASS", name), num_devices=1)
    assert count.flops == products * 2 * 28 * 136 * 512 * 512 * 128
    queries, keys = 2 * 28 * 8192 * 128, 2 * 4 * 8192 * 128
    once = queries + queries  # queries are read, outputs are written
    again = 2 * 28 * 136 * 512 * 128 * 2  # two blocks for each pair of blocks and head
    assert count.hbm_bytes == once + again and again > once + 2 * keys


def test_splash_attention_of_three_rows_costs_three_times_as_much():
    single = several = SPLASH.replace("PASS", "splash_mha_dq")
    for shape in ("28,8192,128", "4,8192,128"):
        several = several.replace(f"[{shape}]", f"[3,{shape}]")
    several = several.replace("{2,1,0:T(8,128)(2,1)}", "{3,2,1,0:T(8,128)(2,1)}")
    count, expected = (count_text(text, num_devices=1) for text in (several, single))
    assert (count.flops, count.hbm_bytes) == (3 * expected.flops, 3 * expected.hbm_bytes)


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("replica_groups={{0,2},{1,3}}", (0, 2)),
        ("replica_groups={}", tuple(range(8))),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", (0, 2)),
        ("source_target_pairs={{3,5},{5,3}}", (3, 5)),
    ],
)
def test_groups_in_all_spellings(groups, first):
    lines = [
        "ENTRY %main (y: f32[1]) -> f32[8] {",
        "  %y = f32[1]{0} parameter(0)",
        f"  ROOT %x = f32[8]{{0}} all-gather(%y), {groups}, use_global_device_ids=true",
        "}",
    ]
    text = "\n".join(lines)
    assert device_group(parse_hlo(text).entry.root, 8) == first


def test_memory_is_xlas_own():
    shapes = [jax.ShapeDtypeStruct(*array) for array in (X, STACK)]
    compiled = jax.jit(layers).lower(*shapes).compile().memory_analysis()
    count = program_cost("layers", jax.jit(layers).lower(*shapes), trips_by_scope({}, 1), 1)
    assert count.arguments == compiled.argument_size_in_bytes == 4 * (N * D + L * D * D)
    assert count.temp == compiled.temp_size_in_bytes and count.added == 4 * N * D
