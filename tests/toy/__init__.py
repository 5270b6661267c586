"""A family of one small operator, `x * sigmoid(x) + y`, which shows what the code generator asks of a family."""
