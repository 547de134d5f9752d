"""Expressions to LLVM instructions, on vectors of consecutive elements.

Vectors are explicit, so nothing depends on what an optimiser manages to vectorise. There is no
contraction and no reassociation: every machine gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from shardmerge.kernels.language import Expr, Type
from shardmerge.kernels.philox import philox_function
from shardmerge.numerics import DType

_I1, _I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_F32, _F64 = ir.FloatType(), ir.DoubleType()
_SCALAR = {Type.F32: _F32, Type.F64: _F64, Type.U32: _I32, Type.BOOL: _I1}
_STORED = {DType.BF16: _I16, DType.F16: _I16, DType.F32: _F32, DType.F64: _F64}
_COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "=="}
_QUIET_NAN = 0x7FC00000
_INFINITY = {DType.F32: 0x7F800000, DType.F64: 0x7FF0000000000000}


class Emitter:
    """Writes the instructions of expressions for ``lanes`` elements from ``index`` on.

    Args:
        aligned: elements, a power of two: ``index`` and the start of inputs and output are
            multiples of them.
    """

    def __init__(
        self,
        builder: ir.IRBuilder,
        *,
        lanes: int,
        index: ir.Value,
        first: ir.Value,
        inputs: Sequence[tuple[ir.Value, DType]],
        parameters: ir.Value,
        keys: ir.Value,
        random_models: int,
        aligned: int = 1,
    ) -> None:
        self.b = builder
        self.lanes = lanes
        self.index = index
        self.first = first
        self.inputs = inputs
        self.parameters = parameters
        self.keys = keys
        self.random_models = random_models
        self.aligned = aligned
        self._drawn: ir.Value | None = None
        self._done: dict[int, ir.Value] = {}
        self._magnitudes: dict[int, ir.Value] = {}

    def type_of(self, scalar: ir.Type) -> ir.Type:
        """The vector (or, for one lane, scalar) type of ``scalar``."""
        return scalar if self.lanes == 1 else ir.VectorType(scalar, self.lanes)

    def constant(self, scalar: ir.Type, value: float | int | bool) -> ir.Constant:
        """``value`` in every lane."""
        if self.lanes == 1:
            return ir.Constant(scalar, value)
        return ir.Constant(self.type_of(scalar), [value] * self.lanes)

    def splat(self, value: ir.Value) -> ir.Value:
        """A scalar in every lane."""
        if self.lanes == 1:
            return value
        vector = self.type_of(value.type)
        one = self.b.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(_I32, 0))
        mask = ir.Constant(ir.VectorType(_I32, self.lanes), [0] * self.lanes)
        return self.b.shuffle_vector(one, ir.Constant(vector, ir.Undefined), mask)

    def emit(self, x: Expr) -> ir.Value:
        """The value of ``x``; each expression is emitted once."""
        if id(x) not in self._done:
            arguments = [self.emit(arg) for arg in x.args]
            self._done[id(x)] = getattr(self, f"_{x.op}")(x, *arguments)
        return self._done[id(x)]

    def widened(self, x: Expr) -> ir.Value:
        """The value of ``x`` as float64."""
        return self._convert(self.emit(x), Type.F64)

    def non_finite(self, number: int) -> ir.Value:
        """Whether input ``number``, which was read, is NaN or infinite."""
        bits = self._magnitudes[number]
        integer = self._element(bits)
        infinity = _INFINITY[DType.F64 if integer == _I64 else DType.F32]
        return self.b.icmp_unsigned(">=", bits, self.constant(integer, infinity))

    def _element(self, value: ir.Value) -> ir.Type:
        return value.type.element if self.lanes > 1 else value.type

    # leaves

    def _literal(self, x: Expr) -> ir.Value:
        convert = float if x.type.is_float else int
        return self.constant(_SCALAR[x.type], convert(x.value))

    def _parameter(self, x: Expr) -> ir.Value:
        place = self.b.gep(self.parameters, [ir.Constant(_I64, int(x.value))])
        return self.splat(self.b.load(place))

    def _input(self, x: Expr) -> ir.Value:
        pointer, dtype = self.inputs[int(x.value)]
        stored = _STORED[dtype]
        place = self.b.gep(self.b.bitcast(pointer, stored.as_pointer()), [self.index])
        vector = self.b.bitcast(place, self.type_of(stored).as_pointer())
        raw = self.b.load(vector, align=dtype.itemsize * self.aligned)
        value = self._from_stored(raw, dtype)
        self._magnitudes[int(x.value)] = self._magnitude_bits(value)
        return self._convert(value, x.type)

    def _from_stored(self, raw: ir.Value, dtype: DType) -> ir.Value:
        if dtype is DType.BF16:
            bits = self.b.shl(self.b.zext(raw, self.type_of(_I32)), self.constant(_I32, 16))
            return self.b.bitcast(bits, self.type_of(_F32))
        if dtype is DType.F16:
            return self._half_to_single(raw)
        return raw

    def _half_to_single(self, raw: ir.Value) -> ir.Value:
        """float16 bits to float32 by scaling: exact for subnormals, and needs no CPU feature."""
        b, wide = self.b, self.b.zext(raw, self.type_of(_I32))
        magnitude = b.shl(b.and_(wide, self.constant(_I32, 0x7FFF)), self.constant(_I32, 13))
        scaled = b.fmul(b.bitcast(magnitude, self.type_of(_F32)), self.constant(_F32, 2.0**112))
        special = b.icmp_unsigned(">=", magnitude, self.constant(_I32, 0x7C00 << 13))
        infinite = b.or_(magnitude, self.constant(_I32, 0x7F800000))
        bits = b.select(special, infinite, b.bitcast(scaled, self.type_of(_I32)))
        sign = b.shl(b.and_(wide, self.constant(_I32, 0x8000)), self.constant(_I32, 16))
        return b.bitcast(b.or_(bits, sign), self.type_of(_F32))

    def _random(self, x: Expr) -> ir.Value:
        """Word ``index % 4`` of Philox4x32-10 with ``index // 4`` as counter, of the flat index."""
        b = self.b
        flat = b.add(self.first, self.index)
        if self._drawn is None:
            draw = philox_function(b.module, self.lanes, self.random_models)
            self._drawn = b.call(draw, [b.lshr(flat, ir.Constant(_I64, 2)), self.keys])
        words = b.extract_value(self._drawn, int(x.value))
        if self.lanes > 1:
            return words
        return b.extract_element(words, b.and_(b.trunc(flat, _I32), ir.Constant(_I32, 3)))

    # operations

    def _add(self, _: Expr, a: ir.Value, c: ir.Value) -> ir.Value:
        return self.b.fadd(a, c)

    def _sub(self, _: Expr, a: ir.Value, c: ir.Value) -> ir.Value:
        return self.b.fsub(a, c)

    def _mul(self, _: Expr, a: ir.Value, c: ir.Value) -> ir.Value:
        return self.b.fmul(a, c)

    def _div(self, _: Expr, a: ir.Value, c: ir.Value) -> ir.Value:
        return self.b.fdiv(a, c)

    def _neg(self, _: Expr, a: ir.Value) -> ir.Value:
        return self.b.fneg(a)

    def _abs(self, x: Expr, a: ir.Value) -> ir.Value:
        bits = self._magnitude_bits(a)
        return self.b.bitcast(bits, self.type_of(_SCALAR[x.type]))

    def _bits(self, _: Expr, a: ir.Value) -> ir.Value:
        """Bits of a magnitude. Every NaN that arithmetic gives has those of one: what else its
        bits hold differs between processors, and counts must not.
        """
        bits, nan = self.b.bitcast(a, self.type_of(_I32)), self.constant(_I32, _QUIET_NAN)
        return self.b.select(self.b.icmp_unsigned("<", bits, nan), bits, nan)

    def _shr(self, x: Expr, a: ir.Value) -> ir.Value:
        return self.b.lshr(a, self.constant(_I32, int(x.value)))

    def _and(self, _: Expr, a: ir.Value, c: ir.Value) -> ir.Value:
        return self.b.and_(a, c)

    def _or(self, _: Expr, a: ir.Value, c: ir.Value) -> ir.Value:
        return self.b.or_(a, c)

    def _xor(self, _: Expr, a: ir.Value, c: ir.Value) -> ir.Value:
        return self.b.xor(a, c)

    def _not(self, _: Expr, a: ir.Value) -> ir.Value:
        return self.b.xor(a, self.constant(_I1, 1))

    def _where(self, _: Expr, condition: ir.Value, a: ir.Value, c: ir.Value) -> ir.Value:
        return self.b.select(condition, a, c)

    def _comparison(self, x: Expr, a: ir.Value, c: ir.Value) -> ir.Value:
        sign = _COMPARISONS[x.op]
        if x.args[0].type is Type.U32:
            return self.b.icmp_unsigned(sign, a, c)
        return self.b.fcmp_ordered(sign, a, c)

    _lt = _le = _gt = _ge = _eq = _comparison

    def _cast(self, x: Expr, a: ir.Value) -> ir.Value:
        return self._convert(a, x.type)

    def _convert(self, a: ir.Value, to: Type) -> ir.Value:
        """Between floating types, and from u32 or conditions to them."""
        target = self.type_of(_SCALAR[to])
        source = self._element(a)
        if source == _SCALAR[to]:
            return a
        if source in (_I32, _I1):
            return self.b.uitofp(a, target)
        return self.b.fpext(a, target) if to is Type.F64 else self.b.fptrunc(a, target)

    def _magnitude_bits(self, value: ir.Value) -> ir.Value:
        double = self._element(value) == _F64
        integer, mask = (_I64, (1 << 63) - 1) if double else (_I32, (1 << 31) - 1)
        bits = self.b.bitcast(value, self.type_of(integer))
        return self.b.and_(bits, self.constant(integer, mask))

    # results

    def store(self, value: ir.Value, pointer: ir.Value, dtype: DType) -> ir.Value:
        """Round ``value`` once to ``dtype`` and write it; gives whether that is NaN or infinity."""
        stored = _STORED[dtype]
        if dtype in (DType.BF16, DType.F16):
            single = self._round_to_odd(value)
            narrow = self._to_bfloat if dtype is DType.BF16 else self._to_half
            raw = self.b.trunc(narrow(single), self.type_of(_I16))
            exponent = 0x7F80 if dtype is DType.BF16 else 0x7C00
            bits = self.b.and_(raw, self.constant(_I16, 0x7FFF))
            bad = self.b.icmp_unsigned(">=", bits, self.constant(_I16, exponent))
        else:
            raw = self._convert(value, Type.F32 if dtype is DType.F32 else Type.F64)
            bits = self._magnitude_bits(raw)
            integer = self._element(bits)
            bad = self.b.icmp_unsigned(">=", bits, self.constant(integer, _INFINITY[dtype]))
        place = self.b.gep(self.b.bitcast(pointer, stored.as_pointer()), [self.index])
        vector = self.b.bitcast(place, self.type_of(stored).as_pointer())
        self.b.store(raw, vector, align=dtype.itemsize * self.aligned)
        return bad

    def _round_to_odd(self, value: ir.Value) -> ir.Value:
        """Bits of ``value`` as float32; from float64 rounded to odd, for one more rounding.

        Reference: Boldo, Melquiond. Emulation of FMA and correctly rounded sums: proved algorithms
        using rounding to odd. IEEE Transactions on Computers 57(4), 2008.
        """
        b = self.b
        bits = self.type_of(_I32)
        if self._element(value) == _F32:
            return b.bitcast(value, bits)
        near = b.fptrunc(value, self.type_of(_F32))
        back = b.fpext(near, self.type_of(_F64))
        # An ordered comparison: NaN counts as exact, and stays NaN.
        inexact = b.fcmp_ordered("!=", back, value)
        above = b.icmp_unsigned(">", self._magnitude_bits(back), self._magnitude_bits(value))
        above = b.and_(above, inexact)
        truncated = b.sub(b.bitcast(near, bits), b.zext(above, bits))
        return b.or_(truncated, b.zext(inexact, bits))

    def _to_bfloat(self, bits: ir.Value) -> ir.Value:
        """float32 bits to bfloat16 bits (in 32), to nearest even; NaN stays a NaN."""
        b = self.b
        odd = b.and_(b.lshr(bits, self.constant(_I32, 16)), self.constant(_I32, 1))
        rounded = b.add(bits, b.add(odd, self.constant(_I32, 0x7FFF)))
        magnitude = b.and_(bits, self.constant(_I32, 0x7FFFFFFF))
        nan = b.icmp_unsigned(">", magnitude, self.constant(_I32, 0x7F800000))
        quiet = b.or_(bits, self.constant(_I32, 0x00400000))
        return b.lshr(b.select(nan, quiet, rounded), self.constant(_I32, 16))

    def _to_half(self, bits: ir.Value) -> ir.Value:
        """float32 bits to float16 bits (in 32), to nearest even, with subnormals and overflow."""
        b = self.b

        def c(value: int) -> ir.Constant:
            return self.constant(_I32, value)

        magnitude = b.and_(bits, c(0x7FFFFFFF))
        # Normal results: rebias the exponent and round on the 13 bits that fall away.
        odd = b.and_(b.lshr(magnitude, c(13)), c(1))
        rebased = b.add(b.sub(magnitude, c(112 << 23)), b.add(odd, c(0x0FFF)))
        normal = b.lshr(rebased, c(13))
        # Subnormal results: adding 0.5 puts the units of 2**-24 into the lowest mantissa bits.
        half = self.constant(_F32, 0.5)
        shifted = b.fadd(b.bitcast(magnitude, self.type_of(_F32)), half)
        subnormal = b.sub(b.bitcast(shifted, self.type_of(_I32)), c(0x3F000000))
        small = b.icmp_unsigned("<", magnitude, c(113 << 23))
        finite = b.select(small, subnormal, normal)
        overflow = b.icmp_unsigned(">=", magnitude, c(0x477FF000))
        nan = b.icmp_unsigned(">", magnitude, c(0x7F800000))
        special = b.select(nan, c(0x7E00), c(0x7C00))
        result = b.select(overflow, special, finite)
        return b.or_(result, b.lshr(b.and_(bits, c(0x80000000)), c(16)))
