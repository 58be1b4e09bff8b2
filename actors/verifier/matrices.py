"""Arithmetic of matrices of trees: sums, products, transposes and small determinants are worked out entry by entry."""

from fractions import Fraction
from itertools import permutations

from actors.verifier.tree import Apply, Matrix, Node, Number, Sequence, Symbol, negate

_MAX_ORDER = 5


def determinant(matrix: Node) -> Node:
    """Leibniz' formula. Raises ValueError unless square and at most 5 x 5."""
    if not isinstance(matrix, Matrix) or not 1 <= len(matrix.rows) <= _MAX_ORDER:
        raise ValueError("determinant of something else than a small square matrix")
    order = len(matrix.rows)
    if any(len(row) != order for row in matrix.rows):
        raise ValueError("determinant of a matrix that is not square")
    terms = []
    for columns in permutations(range(order)):
        inversions = sum(columns[i] > columns[j] for i in range(order) for j in range(i + 1, order))
        term = Apply("*", tuple(matrix.rows[row][column] for row, column in enumerate(columns)))
        terms.append(negate(term) if inversions % 2 else term)
    return Apply("+", tuple(terms))


def simplify_matrices(node: Node) -> Node:
    """The tree with sums, products and transposes of matrices (and products of numbers with matrices) carried out."""
    match node:
        case Apply():
            arguments = tuple(simplify_matrices(argument) for argument in node.arguments)
            return _apply(Apply(node.function, arguments))
        case Sequence():
            return Sequence(node.brackets, tuple(simplify_matrices(item) for item in node.items))
    return node


def _apply(node: Apply) -> Node:
    match node:
        case Apply(function="^", arguments=(Matrix() as matrix, Symbol(name="T"))):
            return Matrix(tuple(zip(*matrix.rows, strict=True)))
        case Apply(function="^", arguments=(Sequence(brackets="()", items=items), Symbol(name="T"))):
            return Matrix(tuple((item,) for item in items))
    matrices = [a for a in node.arguments if isinstance(a, Matrix)]
    if not matrices:
        return node
    if node.function == "+" and len(matrices) == len(node.arguments) and len({_shape(m) for m in matrices}) == 1:
        rows, columns = _shape(matrices[0])
        return Matrix(
            tuple(tuple(Apply("+", tuple(m.rows[r][c] for m in matrices)) for c in range(columns)) for r in range(rows))
        )
    if node.function == "neg":
        return _scale(Number(Fraction(-1)), matrices[0])
    if node.function == "*":
        result: Node = node.arguments[0]
        for factor in node.arguments[1:]:
            result = _multiply(result, factor)
        return result
    if node.function == "/" and isinstance(node.arguments[0], Matrix) and len(matrices) == 1:
        return _scale(Apply("/", (Number(Fraction(1)), node.arguments[1])), matrices[0])
    return node


def _multiply(left: Node, right: Node) -> Node:
    if isinstance(left, Matrix) and isinstance(right, Matrix):
        if _shape(left)[1] != _shape(right)[0]:
            return Apply("*", (left, right))
        columns = list(zip(*right.rows, strict=True))
        return Matrix(
            tuple(
                tuple(
                    Apply("+", tuple(Apply("*", (a, b)) for a, b in zip(row, column, strict=True)))
                    for column in columns
                )
                for row in left.rows
            )
        )
    if isinstance(left, Matrix):
        return _scale(right, left)
    return _scale(left, right) if isinstance(right, Matrix) else Apply("*", (left, right))


def _scale(factor: Node, matrix: Matrix) -> Matrix:
    return Matrix(tuple(tuple(Apply("*", (factor, item)) for item in row) for row in matrix.rows))


def _shape(matrix: Matrix) -> tuple[int, int]:
    return len(matrix.rows), len(matrix.rows[0])
