"""What to write instead of what is no word of the language of rules."""

import ast

OF_ALL = (
    "an element is updated on its own. What is summed over a tensor is for `measure` and a method `factors`, all else "
    "for a method `prologue`"
)
BRANCH = "it would branch on what differs between elements or steps. Write where(condition, x, y)"
LOOP = "there are no loops. Write out the lines"
IN_SCALARS = "it is of scalars alone. Form it in scalars(), in float64"
DTYPE = "values have one dtype, float32, or float64 for float64 parameters. Leave it out"
# What to write instead of other words, by their names.
INSTEAD = {
    **dict.fromkeys(("clip", "clamp_"), "Write clamp(x, low, high), imported from triton_optim.kernels.words"),
    **dict.fromkeys(("max", "amax", "fmax"), "Of two values write maximum(x, y)"),
    **dict.fromkeys(("min", "amin", "fmin"), "Of two values write minimum(x, y)"),
    **dict.fromkeys(("sum", "mean", "norm", "cumsum", "reduce", "argmax", "argmin", "sort", "std", "var"), OF_ALL),
    **dict.fromkeys(("range", "static_range"), LOOP),
    **dict.fromkeys(("to", "float", "double", "half", "bfloat16", "dtype", "type", "cast"), DTYPE),
    **dict.fromkeys(("load", "store", "program_id", "arange", "shape"), "a rule is on values; it has no addresses"),
    **dict.fromkeys(("rand", "randn", "randint"), "nothing is random in a rule"),
    **dict.fromkeys(("zeros", "zeros_like", "full", "full_like", "ones_like"), "Write the number"),
    **dict.fromkeys(("pow", "float_power"), "Write x**2 for a square, sqrt(x) for a root, else exp(y * log(x))"),
    **dict.fromkeys(("print", "device_print", "assert", "device_assert", "static_assert"), "a rule only computes"),
    "reciprocal": "Write 1 / x",
    "square": "Write x**2",
    "lerp": "Write x + weight * (y - x)",
    "fma": "Write x * y + z",
    "div_rn": "Write x / y",
    "sqrt_rn": "Write sqrt(x)",
    "exp2": "Write exp(x * 0.6931471805599453)",
    "log2": "Write log(x) * 1.4426950408889634",
    "sigmoid": "Write 1 / (1 + exp(-x))",
    "tanh": "Write 1 - 2 / (exp(2 * x) + 1)",
    "ceil": "Write -floor(-x)",
    "round": "Write floor(x + 0.5)",
}
OPERATORS: dict[type, str] = {
    ast.FloorDiv: "Write floor(x / y)",
    ast.Mod: "what is left of a division has another sign elsewhere. Write x - y * floor(x / y)",
    ast.MatMult: OF_ALL,
    ast.LShift: "values have no bits. Write x * 2.0 ** n",
    ast.RShift: "values have no bits. Write floor(x * 0.5 ** n)",
}
STATEMENTS: dict[type, str] = {
    ast.For: LOOP,
    ast.While: LOOP,
    ast.Assert: INSTEAD["assert"],
    ast.Raise: INSTEAD["assert"],
    ast.FunctionDef: "a function in a rule has no source of its own. Define it outside, with @jit",
    ast.Lambda: "a function in a rule has no source of its own. Define it outside, with @jit",
    ast.ListComp: LOOP,
    ast.GeneratorExp: LOOP,
}
