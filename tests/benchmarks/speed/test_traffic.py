"""Bytes counted in programs written by hand; the compilers themselves are in no test environment."""

import pytest

from benchmarks.speed.traffic import Array, Kernel, arrays, traffic

HLO = """HloModule jit_step

%fused (p: f32[8,128]) -> f32[8,128] {
  ROOT %x = f32[8,128]{1,0:T(8,128)} add(%p, %p)
}

ENTRY %main (p: f32[8,128], g: f32[8,128]) -> (f32[8,128]) {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  %g = f32[8,128]{1,0:T(8,128)} parameter(1)
  %c = f32[]{:T(128)S(6)} constant(1)
  %copy-start = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%g)
  %sum = f32[128]{0:T(128)S(1)} fusion(%g), kind=kLoop, calls=%fused
  %copy-done = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %new = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)}) fusion(%p, %sum, %copy-done, %p, %c), kind=kLoop
  %get-tuple-element = f32[8,128]{1,0:T(8,128)} get-tuple-element(%new), index=0
  ROOT %tuple = (f32[8,128]{1,0:T(8,128)}) tuple(%get-tuple-element)
}
"""


def test_arrays_are_padded_to_tiles():
    assert arrays("f32[3,130]{1,0:T(8,128)}") == [Array(8 * 256 * 4, False)]
    assert arrays("f32[130,3]{0,1:T(4,128)S(1)}") == [Array(256 * 4 * 4, True)]
    assert arrays("bf16[16,128]{1,0:T(8,128)(2,1)}") == [Array(16 * 128 * 2, False)]
    assert arrays("pred[5]") == [Array(5, False)]
    assert arrays("(s32[], f32[2,2]{1,0})") == [Array(4, False), Array(16, False)]


def test_kernels_move_what_is_in_device_memory():
    """The copy reads g, the sum reads it again, and the last kernel reads p once and writes two."""
    size = 8 * 128 * 4
    found = traffic(HLO)
    assert found.kernels == [Kernel(size, 0), Kernel(size, 0), Kernel(size, 2 * size)]
    assert found.moved == 5 * size
    assert found.outputs == size
    assert found.temporaries == size  # the second of the results is none of the program's


def test_a_slice_counts_only_the_part_it_reads():
    start = """  %slice-start = ((f32[8,128]{1,0:T(8,128)}), f32[8,32]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%g), slice={[0:8], [0:32]}
  %copy-start ="""
    found = traffic(HLO.replace("  %copy-start =", start))
    assert found.kernels[0] == Kernel(8 * 128 * 4, 0)  # 32 columns fill a tile of 128
    assert len(found.kernels) == 4


def test_programs_with_a_loop_are_refused():
    loop = HLO.replace("copy-done(%copy-start)", "while(%copy-start)")
    with pytest.raises(ValueError, match="has a while"):
        traffic(loop)
