"""The passes over the logits as Triton kernels.

A program works on one part of one token's vocabulary. Threads keep running maxima and sums of
their own in registers (the online softmax of Milakov and Gimelshein 2018, arXiv:1805.02867) and
meet only at the end of the part, so that loads follow each other without a barrier.

Legend: ``C`` columns a thread loads at once, ``N`` threads, ``U`` such loads in a row.
"""

# mypy: ignore-errors
# ruff: noqa: N803, SIM102, SIM108
# Triton's language has no types. Capital names are constants; conditions on them stand alone, so
# that what they rule out is not compiled.
import triton
import triton.language as tl

__all__ = ["FORWARD_KL", "JSD", "REVERSE_KL", "kd_kernel", "scale_kernel"]

FORWARD_KL = tl.constexpr(0)
REVERSE_KL = tl.constexpr(1)
JSD = tl.constexpr(2)

_INF = tl.constexpr(float("inf"))


# As constants they would leave loops that never run, over which Triton's compiler breaks down.
@triton.jit(do_not_specialize=["tokens", "columns", "width"])
def kd_kernel(
    student,  # [s, b, v/tp]
    teacher,  # [s, b, v/tp]
    gradient,  # [s, b, v/tp]; may be the student's logits
    weights,  # [tokens] fp32
    normalizers,  # [4, tokens] fp32, with FIRST > 0: of the whole vocabulary
    pivots,  # [tokens] fp32, with FIRST == LAST: expectations that the gradient is relative to
    parts,  # [5, tokens, PARTS] fp32, statistics of each part
    sums,  # [2, tokens, PARTS] fp32, divergence sums of each part (JSD)
    losses,  # [tokens] fp32, weighted, with FIRST == 0 and the gradient
    progress,  # [1 + 2 * tokens] int32 of zeros: tickets given, parts of each phase that are done
    tokens,
    batch,
    columns,
    width,
    student_s,
    student_b,
    student_v,
    teacher_s,
    teacher_b,
    teacher_v,
    gradient_s,
    gradient_b,
    gradient_v,
    temperature,
    beta,
    lag,
    KIND: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    GRADIENT: tl.constexpr,
    PARTS: tl.constexpr,
    TRIM: tl.constexpr,
    CHUNKS: tl.constexpr,
    U: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
):
    """Runs the phases FIRST to LAST: statistics, for JSD divergence sums, gradient.

    Phases of a token follow each other at a distance of ``lag`` tokens, so that its logits are
    still in the cache. Programs take tickets in the order in which they start, and wait only for
    programs with earlier tickets, which are running already: there is always one that does not
    wait, whatever the number of programs on the device.
    """
    PHASES: tl.constexpr = LAST - FIRST + 1
    if PHASES == 1:
        ticket = tl.program_id(0)
    else:
        ticket = tl.atomic_add(progress, 1, sem="relaxed")
    step = ticket // (PHASES * PARTS)
    within = ticket % (PHASES * PARTS)
    phase = FIRST + within // PARTS
    part = within % PARTS
    token = step - (phase - FIRST) * lag
    if (token >= 0) & (token < tokens):
        weight = tl.load(weights + token)
        s = (token // batch).to(tl.int64)
        b = (token % batch).to(tl.int64)
        student += s * student_s + b * student_b
        teacher += s * teacher_s + b * teacher_b
        scale = 1.4426950408889634 / temperature
        begin = part * (CHUNKS * U * N * C)
        end = tl.minimum(begin + CHUNKS * U * N * C, columns)
        done = progress + 1 + token

        if PHASES > 1:
            if phase > FIRST:
                before = done + (phase - FIRST - 1) * tokens
                while tl.atomic_add(before, 0, sem="acquire") < PARTS:
                    pass

        if FIRST == 0:
            if phase == 0:
                if weight != 0:
                    a, sa, c, sc, gap = _statistics(
                        student,
                        student_v,
                        teacher,
                        teacher_v,
                        begin,
                        end,
                        scale,
                        KIND,
                        TRIM,
                        CHUNKS,
                        U,
                        N,
                        C,
                    )
                    _store(parts, 0, token, part, tokens, PARTS, a)
                    _store(parts, 1, token, part, tokens, PARTS, sa)
                    _store(parts, 2, token, part, tokens, PARTS, c)
                    _store(parts, 3, token, part, tokens, PARTS, sc)
                    _store(parts, 4, token, part, tokens, PARTS, gap)
        if (phase > 0) & (weight != 0):
            if FIRST == 0:
                a, sa, c, sc, gap = _merge(
                    _load(parts, 0, token, tokens, PARTS),
                    _load(parts, 1, token, tokens, PARTS),
                    _load(parts, 2, token, tokens, PARTS),
                    _load(parts, 3, token, tokens, PARTS),
                    _load(parts, 4, token, tokens, PARTS),
                    scale,
                    KIND,
                )
                alive = (sa != 0) & (sc != 0)
                a = tl.where(a == -_INF, 0.0, a)
                c = tl.where(c == -_INF, 0.0, c)
                fa = tl.where(alive, 1 / sa, 0.0)
                fc = tl.where(alive, 1 / sc, 0.0)
                if KIND == FORWARD_KL:
                    divergence = gap * fc / temperature + tl.log(sa / sc)
                else:
                    divergence = gap * fa / temperature + tl.log(sc / sa)
                # A comparison that NaN passes, unlike `maximum`.
                divergence = tl.where(alive, tl.where(divergence < 0, 0.0, divergence), 0.0)
                pivot = gap * fa
            else:
                a = tl.load(normalizers + token)
                fa = tl.load(normalizers + tokens + token)
                c = tl.load(normalizers + 2 * tokens + token)
                fc = tl.load(normalizers + 3 * tokens + token)
                pivot = tl.load(pivots + token)
            if KIND == JSD:
                if FIRST < 2:
                    if phase == 1:
                        p_sum, q_sum = _divergence_sums(
                            student,
                            student_v,
                            teacher,
                            teacher_v,
                            begin,
                            end,
                            scale,
                            a,
                            fa,
                            c,
                            fc,
                            beta,
                            TRIM,
                            CHUNKS,
                            U,
                            N,
                            C,
                        )
                        _store(sums, 0, token, part, tokens, PARTS, p_sum)
                        _store(sums, 1, token, part, tokens, PARTS, q_sum)
                    elif LAST == 2:
                        pivot = tl.sum(_load(sums, 1, token, tokens, PARTS), 0)
                        p_sum = tl.sum(_load(sums, 0, token, tokens, PARTS), 0)
                        divergence = beta * p_sum + (1 - beta) * pivot
            if GRADIENT:
                if phase == LAST:
                    _gradient(
                        student,
                        student_v,
                        teacher,
                        teacher_v,
                        gradient + s * gradient_s + b * gradient_b,
                        gradient_v,
                        begin,
                        end,
                        scale,
                        a,
                        fa,
                        c,
                        fc,
                        pivot,
                        beta,
                        weight * temperature,
                        1 / temperature,
                        KIND,
                        TRIM,
                        CHUNKS,
                        U,
                        N,
                        C,
                    )
                    if FIRST == 0:
                        if part == 0:
                            tl.store(
                                losses + token, weight * divergence * temperature * temperature
                            )
        if GRADIENT:
            if phase == LAST:
                row = gradient + s * gradient_s + b * gradient_b
                if weight == 0:
                    _zero(row, gradient_v, begin, end, U * N * C)
                    if FIRST == 0:
                        if part == 0:
                            tl.store(losses + token, 0.0)
                if part == PARTS - 1:
                    _zero(row, gradient_v, columns, width, U * N * C)

        if PHASES > 1:
            if phase < LAST:
                # All of the program's stores come before the count that announces them.
                tl.debug_barrier()
                tl.atomic_add(done + (phase - FIRST) * tokens, 1, sem="release")


@triton.jit
def _statistics(
    student,
    student_v,
    teacher,
    teacher_v,
    begin,
    end,
    scale,
    KIND: tl.constexpr,
    TRIM: tl.constexpr,
    CHUNKS: tl.constexpr,
    U: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
):
    a = tl.full([N], -_INF, tl.float32)
    c = tl.full([N], -_INF, tl.float32)
    sa = tl.zeros([N], tl.float32)
    sc = tl.zeros([N], tl.float32)
    gap = tl.zeros([N], tl.float32)
    for i in range(CHUNKS):
        at, mask = _columns(begin + i * (U * N * C), end, TRIM, U, N, C)
        x = _logits(student, student_v, at, mask, end, "evict_last", TRIM)
        y = _logits(teacher, teacher_v, at, mask, end, "evict_last", TRIM)
        a, sa, c, sc, gap = _accumulate(x, y, a, sa, c, sc, gap, scale, KIND)
    return _merge(a, sa, c, sc, gap, scale, KIND)


@triton.jit
def _accumulate(x, y, a, sa, c, sc, gap, scale, KIND: tl.constexpr):
    """Takes a block of logits ``[U, N, C]`` into the running statistics ``[N]``."""
    x, y = _possible(x, y, KIND)
    new_a = tl.maximum(a, tl.max(tl.max(x, 2), 0))
    new_c = tl.maximum(c, tl.max(tl.max(y, 2), 0))
    base_a = tl.where(new_a == -_INF, 0.0, new_a)
    base_c = tl.where(new_c == -_INF, 0.0, new_c)
    x -= base_a[None, :, None]
    y -= base_c[None, :, None]
    ex = tl.exp2(x * scale)
    ey = tl.exp2(y * scale)
    shift_a = a - base_a
    shift_c = c - base_c
    fa = tl.exp2(shift_a * scale)
    fc = tl.exp2(shift_c * scale)
    # 0 * inf and inf - inf are NaN; an impossible entry has no say.
    if KIND == FORWARD_KL:
        moved = tl.where(sc == 0, 0.0, fc * (gap + sc * (shift_c - shift_a)))
        gap = moved + _sum(tl.where(ey == 0, 0.0, ey * (y - x)))
    elif KIND == REVERSE_KL:
        moved = tl.where(sa == 0, 0.0, fa * (gap + sa * (shift_a - shift_c)))
        gap = moved + _sum(tl.where(ex == 0, 0.0, ex * (x - y)))
    return new_a, sa * fa + _sum(ex), new_c, sc * fc + _sum(ey), gap


@triton.jit
def _merge(a, sa, c, sc, gap, scale, KIND: tl.constexpr):
    """Statistics of all from those of each, along the one axis."""
    top_a = tl.max(a, 0)
    top_c = tl.max(c, 0)
    shift_a = tl.where(a == -_INF, 0.0, a - top_a)
    shift_c = tl.where(c == -_INF, 0.0, c - top_c)
    fa = tl.exp2(shift_a * scale)
    fc = tl.exp2(shift_c * scale)
    if KIND == FORWARD_KL:
        gap = fc * (gap + sc * (shift_c - shift_a))
    elif KIND == REVERSE_KL:
        gap = fa * (gap + sa * (shift_a - shift_c))
    return top_a, tl.sum(sa * fa, 0), top_c, tl.sum(sc * fc, 0), tl.sum(gap, 0)


@triton.jit
def _divergence_sums(
    student,
    student_v,
    teacher,
    teacher_v,
    begin,
    end,
    scale,
    a,
    fa,
    c,
    fc,
    beta,
    TRIM: tl.constexpr,
    CHUNKS: tl.constexpr,
    U: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
):
    p_sum = tl.zeros([N], tl.float32)
    q_sum = tl.zeros([N], tl.float32)
    for i in range(CHUNKS):
        at, mask = _columns(begin + i * (U * N * C), end, TRIM, U, N, C)
        x = _logits(student, student_v, at, mask, end, "evict_last", TRIM)
        y = _logits(teacher, teacher_v, at, mask, end, "evict_last", TRIM)
        q = fa * tl.exp2((x - a) * scale)
        p = fc * tl.exp2((y - c) * scale)
        p_sum += _sum(tl.where(p == 0, 0.0, p * _log_share(p, q, beta)))
        q_sum += _sum(tl.where(q == 0, 0.0, q * _log_share(q, p, 1 - beta)))
    return tl.sum(p_sum, 0), tl.sum(q_sum, 0)


@triton.jit
def _gradient(
    student,
    student_v,
    teacher,
    teacher_v,
    gradient,
    gradient_v,
    begin,
    end,
    scale,
    a,
    fa,
    c,
    fc,
    pivot,
    beta,
    factor,
    inverse_temperature,
    KIND: tl.constexpr,
    TRIM: tl.constexpr,
    CHUNKS: tl.constexpr,
    U: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
):
    if KIND == JSD:
        factor *= 1 - beta
    for i in range(CHUNKS):
        at, mask = _columns(begin + i * (U * N * C), end, TRIM, U, N, C)
        x = _logits(student, student_v, at, mask, end, "evict_first", TRIM)
        y = _logits(teacher, teacher_v, at, mask, end, "evict_first", TRIM)
        value = _slope(x, y, scale, a, fa, c, fc, pivot, beta, factor, inverse_temperature, KIND)
        value = value.to(gradient.dtype.element_ty)
        tl.store(gradient + at * gradient_v, value, mask=mask, eviction_policy="evict_first")


@triton.jit
def _slope(x, y, scale, a, fa, c, fc, pivot, beta, factor, inverse_temperature, KIND: tl.constexpr):
    """The gradient by a block of the student's logits."""
    x, y = _possible(x, y, KIND)
    x -= a
    y -= c
    if KIND == FORWARD_KL:
        return (factor * fa) * tl.exp2(x * scale) - (factor * fc) * tl.exp2(y * scale)
    q = fa * tl.exp2(x * scale)
    if KIND == REVERSE_KL:
        excess = (x - y - pivot) * inverse_temperature
    else:
        excess = _log_share(q, fc * tl.exp2(y * scale), 1 - beta) - pivot
    return tl.where(q == 0, 0.0, factor * q * excess)


@triton.jit
def _possible(x, y, KIND: tl.constexpr):
    """Leaves out entries that would make the loss infinite."""
    if KIND == FORWARD_KL:
        y = tl.where(x == -_INF, -_INF, y)
    elif KIND == REVERSE_KL:
        x = tl.where(y == -_INF, -_INF, x)
    return x, y


@triton.jit
def _log_share(a, b, weight):
    """``log(a / m)`` with ``m = weight a + (1 - weight) b``; not defined where a is 0."""
    # In this form m is exactly a where a and b are equal. It may underflow before a does.
    share = a / (a + (1 - weight) * (b - a))
    return tl.log(tl.where(share > 1 / weight, 1 / weight, share))


@triton.jit
def _columns(first, end, TRIM: tl.constexpr, U: tl.constexpr, N: tl.constexpr, C: tl.constexpr):
    """Columns ``[U, N, C]`` of a block and which of them to touch.

    A thread's C columns lie side by side. But for TRIM == 2 they are touched together, as one
    wide access, if the first of them is before the end.
    """
    u = tl.arange(0, U).to(tl.int64)[:, None, None] * (N * C)
    lead = first + u + tl.arange(0, N)[None, :, None] * C
    at = lead + tl.arange(0, C)[None, None, :]
    if TRIM == 2:
        return at, at < end
    return at, tl.broadcast_to(lead < end, [U, N, C])


@triton.jit
def _logits(row, stride, at, mask, end, EVICTION: tl.constexpr, TRIM: tl.constexpr):
    """Loads a block of logits to fp32, with ``-inf`` from the end on."""
    block = tl.load(row + at * stride, mask=mask, other=-_INF, eviction_policy=EVICTION)
    block = block.to(tl.float32)
    if TRIM == 1:
        block = tl.where(at < end, block, -_INF)
    return block


@triton.jit
def _sum(block):
    return tl.sum(tl.sum(block, 2), 0)


@triton.jit
def _store(table, row, token, part, tokens, PARTS: tl.constexpr, value):
    tl.store(table + (row * tokens + token).to(tl.int64) * PARTS + part, value)


@triton.jit
def _load(table, row, token, tokens, PARTS: tl.constexpr):
    # Past the first-level cache, which does not see what other multiprocessors write.
    at = (row * tokens + token).to(tl.int64) * PARTS + tl.arange(0, PARTS)
    return tl.load(table + at, cache_modifier=".cg")


@triton.jit
def _zero(row, stride, begin, end, BLOCK: tl.constexpr):
    column = begin
    while column < end:
        at = column + tl.arange(0, BLOCK).to(tl.int64)
        zeros = tl.zeros([BLOCK], row.dtype.element_ty)
        tl.store(row + at * stride, zeros, mask=at < end)
        column += BLOCK


@triton.jit
def scale_kernel(
    gradient,  # [s, b, v/tp]
    factor,  # one fp32
    batch,
    width,
    gradient_s,
    gradient_b,
    gradient_v,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Multiplies a gradient by a number on the device; by 1 it costs next to nothing."""
    value = tl.load(factor)
    if value != 1.0:
        token = tl.program_id(0)
        gradient += (token // batch).to(tl.int64) * gradient_s
        gradient += (token % batch).to(tl.int64) * gradient_b
        for i in range(CHUNKS):
            at = i * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
            entry = gradient + at * gradient_v
            old = tl.load(entry, mask=at < width, other=0.0).to(tl.float32)
            tl.store(entry, (old * value).to(gradient.dtype.element_ty), mask=at < width)
