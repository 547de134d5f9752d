"""Philox4x32-10 as an LLVM function: random words of consecutive counters.

Reference: Salmon, Moraes, Dror, Shaw. Parallel Random Numbers: As Easy as 1, 2, 3. SC 2011,
section 4.3.
"""

from __future__ import annotations

from llvmlite import ir

from shardmerge.numerics import PHILOX_M0, PHILOX_M1, PHILOX_ROUNDS, PHILOX_W0, PHILOX_W1

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_WORDS = 4


def philox_function(module: ir.Module, lanes: int, models: int) -> ir.Function:
    """The function ``(counter, keys) -> words of each model`` of ``module``, made on first use.

    For each model it gives the four words of each of ``lanes // 4`` counters (of one, for fewer
    lanes) from ``counter`` on, in order. All models are drawn at a time: one chain of ten rounds
    waits for its products most of the time, several fill the gaps.
    """
    blocks = max(1, lanes // _WORDS)
    name = f"philox_{blocks}x{models}"
    if name in module.globals:
        return module.globals[name]
    words = ir.ArrayType(ir.VectorType(_I32, blocks * _WORDS), models)
    function = ir.Function(module, ir.FunctionType(words, [_I64, _I32.as_pointer()]), name)
    function.linkage = "internal"
    function.attributes.add("noinline")  # compiled once, however large the loop that calls it is
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    counter, keys = function.args
    result = ir.Constant(words, ir.Undefined)
    for model, drawn in enumerate(
        _rounds(builder, _counters(builder, counter, blocks), keys, models)
    ):
        result = builder.insert_value(result, _interleaved(builder, drawn, blocks), model)
    builder.ret(result)
    return function


def _splat(b: ir.IRBuilder, value: ir.Value, count: int) -> ir.Value:
    vector = ir.VectorType(value.type, count)
    empty = ir.Constant(vector, ir.Undefined)
    one = b.insert_element(empty, value, ir.Constant(_I32, 0))
    return b.shuffle_vector(one, empty, ir.Constant(ir.VectorType(_I32, count), [0] * count))


def _counters(b: ir.IRBuilder, first: ir.Value, blocks: int) -> ir.Value:
    steps = ir.Constant(ir.VectorType(_I64, blocks), list(range(blocks)))
    return b.add(_splat(b, first, blocks), steps)


def _rounds(
    b: ir.IRBuilder, counter: ir.Value, keys: ir.Value, models: int
) -> list[list[ir.Value]]:
    """For each model, four words of each counter, each in the low half of 64 bits.

    Words stay in 64-bit lanes: the product of two low halves is then one machine instruction.
    """
    count = counter.type.count

    def constant(value: int) -> ir.Constant:
        return ir.Constant(counter.type, [value] * count)

    low, places = constant(0xFFFFFFFF), constant(32)
    start = [b.and_(counter, low), b.lshr(counter, places), constant(0), constant(0)]
    words = [start] * models
    key = [b.load(b.gep(keys, [ir.Constant(_I64, place)])) for place in range(2 * models)]
    for _ in range(PHILOX_ROUNDS):
        for model, (c0, c1, c2, c3) in enumerate(words):
            p0, p1 = b.mul(c0, constant(PHILOX_M0)), b.mul(c2, constant(PHILOX_M1))
            k0, k1 = (_splat(b, b.zext(word, _I64), count) for word in key[2 * model :][:2])
            words[model] = [
                b.xor(b.xor(b.lshr(p1, places), c1), k0),
                b.and_(p1, low),
                b.xor(b.xor(b.lshr(p0, places), c3), k1),
                b.and_(p0, low),
            ]
        bumps = (PHILOX_W0, PHILOX_W1) * models
        key = [b.add(word, ir.Constant(_I32, w)) for word, w in zip(key, bumps, strict=True)]
    return words


def _interleaved(b: ir.IRBuilder, words: list[ir.Value], blocks: int) -> ir.Value:
    """Element 0 of each word, then element 1 of each, ..., as 32 bits."""

    def indices(values: list[int]) -> ir.Constant:
        return ir.Constant(ir.VectorType(_I32, len(values)), values)

    narrow = [b.trunc(word, ir.VectorType(_I32, blocks)) for word in words]
    joined = indices(list(range(2 * blocks)))
    first = b.shuffle_vector(narrow[0], narrow[1], joined)
    second = b.shuffle_vector(narrow[2], narrow[3], joined)
    order = [word * blocks + block for block in range(blocks) for word in range(_WORDS)]
    return b.shuffle_vector(first, second, indices(order))
