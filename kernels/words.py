"""Words of rules that are made of others, so that they are the same on every backend."""

from .language import abs, jit, maximum, minimum, sqrt, where


@jit
def clamp(x, low, high):
    """`x`, or the bound that it is beyond; NaN where it is."""
    return minimum(maximum(x, low), high)


@jit
def rsqrt(x):
    """1 / its root."""
    return 1.0 / sqrt(x)


@jit
def atan2(y, x):
    """The angle of the point (x, y), from -pi to pi: within 4 ulp. -0 counts as 0.

    Of the smaller magnitude over the larger, which above 0.66 is turned by pi / 4, it is the rational function of
    Moshier's Cephes library (1989), atan.c, https://www.netlib.org/cephes/.
    """
    across, along = abs(x), abs(y)
    small, large = minimum(across, along), maximum(across, along)
    # Of two infinities 1, of two zeros 0.
    ratio = where(small == large, where(large == 0, 0.0, 1.0), small / where(large == 0, 1.0, large))
    turned = ratio > 0.66
    t = where(turned, (ratio - 1.0) / (ratio + 1.0), ratio)
    z = t * t
    over = -8.750608600031904122785e-1 * z - 1.615753718733365076637e1
    over = (over * z - 7.500855792314704667340e1) * z - 1.228866684490136173410e2
    over = over * z - 6.485021904942025371773e1
    under = z + 2.485846490142306297962e1
    under = (under * z + 1.650270098316988542046e2) * z + 4.328810604912902668951e2
    under = (under * z + 4.853903996359136964868e2) * z + 1.945506571482613964425e2
    angle = t + t * (z * over / under)
    angle = where(turned, 0.785398163397448309616 + angle, angle)
    angle = where(along > across, 1.570796326794896619231 - angle, angle)
    angle = where(x < 0, 3.141592653589793238463 - angle, angle)
    return where(y < 0, -angle, angle)


COMPOSED = {"atan2": atan2, "clamp": clamp, "rsqrt": rsqrt}
