"""plan/hlo.py, traffic.py, costs.py: what is read from optimised HLO, by small texts and by libtpu's own."""

import pathlib

import pytest

from semflow_jax.plan.costs import read_costs
from semflow_jax.plan.hlo import Leaf, parse
from semflow_jax.plan.traffic import Traffic

GOLDEN = pathlib.Path(__file__).parent / "golden"  # see make_plan_hlo.py there
MIB = 2**20
PADDED = "window={size=3x3 pad=1_1x1_1}"


def golden(name: str) -> str:
    return (GOLDEN / f"plan_{name}.hlo").read_text()


def entry(*lines: str, before: str = "", devices: int = 4) -> str:
    head = f"HloModule m, num_partitions={devices}\n\n{before}\n\nENTRY %main (p: f32[8]) -> f32[8] {{"
    return "\n".join((head, *lines, "}"))


@pytest.mark.parametrize(
    ("dtype", "dims", "layout", "num_bytes"),
    [
        ("f32", (), "", 4),
        ("bf16", (3, 5), "", 30),
        ("bf16", (16, 256), "1,0:T(8,128)(2,1)", 8192),
        ("bf16", (3, 5), "1,0:T(8,128)(2,1)", 8 * 128 * 2),
        ("f32", (5, 300), "0,1:T(8,128)", 304 * 128 * 4),  # the first dimension is the innermost
        ("s32", (2,), "0:T(128)", 512),
        ("f8e4m3fn", (10,), "0", 10),
        ("s4", (10,), "0", 5),
        ("pred", (7,), "0", 7),
    ],
)
def test_bytes_of_arrays_as_the_chip_stores_them(dtype, dims, layout, num_bytes):
    assert Leaf(dtype, dims, layout).num_bytes == num_bytes


def test_instructions():
    module = parse(golden("scan"))
    assert module.num_devices == 4
    loop = next(x for x in module.computations[module.entry].values() if x.op == "while")
    assert [leaf.dims for leaf in loop.shape] == [(), (2048, 2048), (2048, 2048), ()]
    assert [leaf.in_hbm for leaf in loop.shape] == [True, False, False, True]
    assert set(loop.called) == {"condition", "body"} and len(loop.operands) == 1
    with pytest.raises(ValueError, match="ENTRY expected, found none"):
        parse("HloModule m\n")


LOOP = """%body (b: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %b = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %x = f32[8] get-tuple-element(%b), index=1
  %y = f32[8] negate(%x)
  ROOT %t = (s32[], f32[8]) tuple(%i, %y)
}}

%condition (c: (s32[], f32[8])) -> pred[] {{
  %c = (s32[], f32[8]) parameter(0)
  %j = s32[] get-tuple-element(%c), index=0
  %n = s32[] {end}
  ROOT %less = pred[] compare(%j, %n), direction={direction}
}}"""


@pytest.mark.parametrize(
    ("start", "end", "direction", "noted", "turns"),
    [
        ("constant(0)", "constant(10)", "LT", "", 10),
        ("constant(4)", "constant(10)", "LT", "", 6),
        ("constant(4)", "constant(3)", "LT", "", 0),
        ("constant(0)", "constant(10)", "GT", "", None),
        ("constant(0)", "constant(1)", "LT f32", "", None),
        ("parameter(1)", "constant(10)", "LT", "", None),
        ("constant(0)", "get-tuple-element(%c), index=0", "LT", "", 0),
        ("parameter(1)", "constant(10)", "LT", ', backend_config={"known_trip_count":{"n":"7"}}', 7),
    ],
)
def test_turns_of_loops(start, end, direction, noted, turns):
    lines = (
        f"  %zero = s32[] {start}",
        "  %copy = s32[] copy(%zero)",
        "  %p = f32[8] parameter(0)",
        "  %first = (s32[], f32[8]) tuple(%copy, %p)",
        f"  ROOT %loop = (s32[], f32[8]) while(%first), condition=%condition, body=%body{noted}",
    )
    text = entry(*lines, before=LOOP.format(end=end, direction=direction.split()[0]))
    if "f32" in direction:
        text = text.replace("s32[]", "f32[]")
    module = parse(text)
    assert module.num_turns("main", module.computations["main"]["loop"]) == turns
    costs = read_costs(text, turns=100)
    outside = 8  # the copy of the counter
    assert costs.hbm_bytes - outside == 64 * (100 if turns is None else turns)
    assert costs.unknown_loops == (turns is None)


FUSIONS = """%slice_of (q: f32[1000], i: s32[]) -> f32[10] {
  %q = f32[1000] parameter(0)
  %i = s32[] parameter(1)
  %view = f32[1000] bitcast(%q)
  ROOT %s = f32[10] dynamic-slice(%view, %i), dynamic_slice_sizes={10}
}

%update_of (q: f32[1000], u: f32[10], i: s32[]) -> f32[1000] {
  %q = f32[1000] parameter(0)
  %u = f32[10] parameter(1)
  %i = s32[] parameter(2)
  ROOT %d = f32[1000] dynamic-update-slice(%q, %u, %i)
}

%whole (q: f32[1000]) -> (f32[1000], f32[1000]) {
  %q = f32[1000] parameter(0)
  %e = f32[1000] exponential(%q)
  ROOT %t = (f32[1000], f32[1000]) tuple(%e, %q)
}

%both (q: f32[1000], i: s32[]) -> f32[1000] {
  %q = f32[1000] parameter(0)
  %i = s32[] parameter(1)
  %s = f32[10] fusion(%q, %i), kind=kLoop, calls=%slice_of
  ROOT %d = f32[1000] dynamic-update-slice(%q, %s, %i)
}"""


@pytest.mark.parametrize(
    ("line", "moved"),
    [
        ("%x = f32[1000] add(%p, %p)", 12000),
        ("%x = f32[1000]{0:S(1)} add(%p, %v)", 4000),
        ("%x = f32[1000] bitcast(%p)", 0),
        ("%x = (f32[1000], s32[]) tuple(%p, %i)", 0),
        ("%x = f32[10] fusion(%p, %i), kind=kLoop, calls=%slice_of", 40 + 4 + 40),
        ("%x = f32[1000] fusion(%p, %u, %i), kind=kLoop, calls=%update_of", 40 + 4 + 40),
        ("%x = (f32[1000], f32[1000]) fusion(%p), kind=kLoop, calls=%whole", 4000 + 4000),
        ("%x = f32[1000] fusion(%p, %i), kind=kLoop, calls=%both", 40 + 4 + 40),
        ("%x = f32[10] dynamic-slice(%p, %i), dynamic_slice_sizes={10}", 80),
        ("%x = f32[1000] dynamic-update-slice(%p, %u, %i)", 80),
        ("%x = (f32[1000]{0:S(1)}, f32[1000], u32[]) copy-start(%p)", 4000),
        ("%x = f32[1000]{0:S(1)} copy-done(%v)", 0),
        ("%x = ((f32[1000]), f32[10]{0:S(1)}, s32[]) slice-start(%p), slice={[0:10]}", 40),
        ("%x = f32[4000] all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={0}", 20000),
        ("%x = (f32[1000], f32[4000]) all-gather-start(%p), replica_groups={{0,1,2,3}}, dimensions={0}", 20000),
        ('%x = f32[1000] custom-call(%u, %u), custom_call_target="ConcatBitcast"', 0),
        ('%x = f32[1000] custom-call(%p), custom_call_target="tpu_custom_call"', 8000),
    ],
)
def test_bytes_moved(line, moved):
    names = ("%p = f32[1000] parameter(0)", "%v = f32[1000]{0:S(1)} parameter(1)", "%u = f32[10] parameter(2)")
    module = parse(entry(*names, "%i = s32[] parameter(3)", f"  ROOT {line}", before=FUSIONS))
    assert Traffic(module).moved("main", module.computations["main"]["x"]) == moved


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1},{2,3}}", 2),
        ("replica_groups=[1,4]<=[4]", 4),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", 2),
        ("replica_groups=mesh['data'=8,'fsdp'=4] {'fsdp'}", 4),
        ("replica_groups=mesh['data'=8,'fsdp'=4] {'data','fsdp'}", 32),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", 2),
        ("replica_groups=mesh['a'=4,'b'=1,'c'=16], device_ids=([16,4]T(1,0)) {'c'}", 16),
        ("replica_groups={}", 4),
    ],
)
def test_chips_of_a_collective(groups, size):
    line = f"ROOT %x = f32[8] all-to-all(%p), channel_id=1, {groups}, dimensions={{0}}"
    (found,) = read_costs(entry("%p = f32[8] parameter(0)", line)).collectives
    assert (found.kind, found.group, found.num_bytes, found.in_loop) == ("all-to-all", size, 32, False)


def test_an_unknown_notation_is_not_taken_for_all_chips():
    line = "ROOT %x = f32[8] all-to-all(%p), replica_groups=<new>, dimensions={0}"
    with pytest.raises(ValueError, match="replica_groups in a known notation expected"):
        read_costs(entry("%p = f32[8] parameter(0)", line))


def test_the_dearest_branch_counts():
    branches = """%cheap (a: f32[8]) -> f32[8] {
  %a = f32[8] parameter(0)
  ROOT %r = f32[8] negate(%a)
}

%dear (a: f32[8]) -> f32[8] {
  %a = f32[8] parameter(0)
  %b = f32[8] negate(%a)
  ROOT %r = f32[8] negate(%b)
}"""
    names = ("%p = f32[8] parameter(0)", "%i = s32[] parameter(1)")
    listed = "  ROOT %x = f32[8] conditional(%i, %p, %p), branch_computations={%cheap, %dear}"
    assert read_costs(entry(*names, listed, before=branches)).hbm_bytes == 128
    named = "  ROOT %x = f32[8] conditional(%i, %p, %p), true_computation=%dear, false_computation=%cheap"
    assert read_costs(entry(*names, named, before=branches)).hbm_bytes == 128


@pytest.mark.parametrize(
    ("shapes", "attributes", "flops"),
    [
        # 3 x 3 taps on a padded 4 x 4 map: 10 of 12 pairs of an output and a tap lie inside, along each axis
        ("2,4,4,8 3,3,8,16 2,4,4,16", f"b01f_01io->b01f, {PADDED}", 100 * 8 * 16 * 2),
        ("2,4,4,8 3,3,4,16 2,4,4,16", f"b01f_01io->b01f, {PADDED}, feature_group_count=2", 100 * 4 * 16 * 2),
        ("2,4,4,8 3,3,8,16 2,2,2,16", "b01f_01io->b01f, window={size=3x3 stride=2x2 pad=0_1x0_1}", 25 * 8 * 16 * 2),
        # zeros between the inputs: one place of three is no work
        ("1,2,8 1,8,16 1,3,16", "b0f_0io->b0f, window={size=1 lhs_dilate=2}", 2 * 8 * 16),
        ("32,64 64,128 32,128", "bf_io->bf", 32 * 64 * 128),
    ],
)
def test_flops_of_convolutions(shapes, attributes, flops):
    left, right, out = shapes.split()
    names = (f"%l = f32[{left}] parameter(0)", f"%r = f32[{right}] parameter(1)")
    line = f"ROOT %x = f32[{out}] convolution(%l, %r), dim_labels={attributes}"
    assert read_costs(entry(*names, line)).flops == 2 * flops


def test_flops_of_products():
    names = ("%l = f32[3,5,7] parameter(0)", "%r = f32[3,7,11] parameter(1)")
    dims = "lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}"
    assert read_costs(entry(*names, f"ROOT %x = f32[3,5,11] dot(%l, %r), {dims}")).flops == 2 * 3 * 5 * 7 * 11


def test_a_loop_that_stays_on_the_chip():
    """Ten products; weights and rows come from HBM once, and the result goes there."""
    costs = read_costs(golden("scan"))
    assert costs.flops == 10 * 2 * 2048**3
    assert costs.hbm_bytes == pytest.approx(24 * MIB, rel=1e-3)
    assert costs.collectives == () and costs.unknown_loops == 0


def test_a_sum_over_chips():
    costs = read_costs(golden("psum"))
    (found,) = costs.collectives
    assert (found.kind, found.num_bytes, found.group, found.count) == ("all-reduce", 16 * MIB, 4, 1)
    assert costs.hbm_bytes == 32 * MIB  # the array is read, doubled on the chip, and its sum written


def test_sharded_layers():
    """Two forward products, two of weights' gradients, one of the inputs'; each weight is gathered once and its
    gradient scattered once, although the compiler spreads a gather over three fusions, and pads what it scatters.
    """
    costs = read_costs(golden("fsdp"))
    assert costs.flops == 5 * 2 * 1024 * 4096**2
    sizes: dict[str, list[int]] = {}
    for c in costs.collectives:
        sizes.setdefault(c.kind, []).append(c.num_bytes)
    assert sizes["all-gather"] == [32 * MIB] * 2
    assert sizes["reduce-scatter"] == pytest.approx([32 * MIB] * 2, rel=0.1)
    assert costs.inside_loops() == []


def test_a_gather_inside_of_a_loop_is_found():
    costs = read_costs(golden("gather_in_loop"))
    (found,) = costs.inside_loops(min_bytes=32 * MIB)
    assert (found.kind, found.num_bytes, found.count, found.in_loop) == ("all-gather", 32 * MIB, 3, True)
    assert costs.inside_loops(min_bytes=32 * MIB + 1) == []
    assert costs.flops == 3 * 2 * 1024 * 4096**2
