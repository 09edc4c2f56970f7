"""The parameters cell of a notebook: names, types, defaults and meanings, read without running it, and checks against them."""

import ast
import io
import json
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Optional

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from lab.errors import SettingsError, unknown

TAG = "parameters"
_TYPES: dict[str, Any] = {"int": int, "float": float, "str": str, "bool": bool, "list": list, "dict": dict, "tuple": tuple, "None": None}


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell: `name: annotation = default  # meaning`."""

    name: str
    annotation: str
    type: Any
    default: Any
    meaning: str

    def check(self, value: Any) -> Any:
        """`value` if it has this parameter's type (an int may stand for a float); SettingsError otherwise."""
        hint = ""
        try:
            return _adapter(self.type).validate_python(value)
        except ValidationError as error:
            message = error.errors()[0]["msg"]
        if isinstance(value, str) and self.annotation == "float" and _is_number(value):
            hint = f" YAML reads {value} as text: write {float(value)!r}, or with a point, as in 1.0e-4."
        raise SettingsError(f"{self.name} = {value!r}: {message[:1].lower()}{message[1:]} ({self.annotation}).{hint}")

    def parse(self, text: str) -> Any:
        """The value that `text` of a command line stands for, checked: YAML literals, except that text may go unquoted."""
        if self.type is str:
            return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
        if self.type is float and _is_number(text):
            return float(text)
        try:
            return self.check(yaml.safe_load(text))
        except yaml.YAMLError:
            raise SettingsError(f"{self.name} = {text!r}: not a YAML value ({self.annotation}).") from None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@cache
def _adapter(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind, config=ConfigDict(strict=True))


def parameters_of(notebook: Path) -> dict[str, Parameter]:
    """{name: Parameter} of the cell tagged `parameters`, in order; SettingsError if the cell is absent, double or no plain literals."""
    cells = [cell for cell in _cells(notebook) if TAG in cell.get("metadata", {}).get("tags", [])]
    if len(cells) != 1:
        raise SettingsError(f"{notebook}: exactly one cell must be tagged {TAG!r}, found {len(cells)}.")
    source = "".join(cells[0]["source"])
    try:
        return parse_cell(source)
    except SyntaxError as error:
        raise SettingsError(f"{notebook}: parameters cell, line {error.lineno}: {error.msg}.") from None


def _cells(notebook: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads(Path(notebook).read_text())
    except FileNotFoundError:
        raise SettingsError(f"There is no notebook {notebook}.") from None
    except ValueError:
        content = None
    if not isinstance(content, dict) or not isinstance(content.get("cells"), list):
        raise SettingsError(f"{notebook} is not a notebook file.")
    return content["cells"]


def parse_cell(source: str) -> dict[str, Parameter]:
    """The parameters of a cell's source; SyntaxError for anything but `name: type = literal` lines, docstrings and comments."""
    try:
        statements, comments = ast.parse(source).body, _comments(source)
    except (ValueError, tokenize.TokenError) as error:
        raise SyntaxError(str(error), ("parameters", 1, 0, "")) from None
    found: dict[str, Parameter] = {}
    for statement in statements:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value is not None):
            raise _syntax(statement, "only `name: type = literal` may stand here")
        parameter = _parameter(statement, comments.get(statement.end_lineno or 0, ""))
        if parameter.name in found:
            raise _syntax(statement, f"{parameter.name} is given twice")
        found[parameter.name] = parameter
    return found


def _parameter(statement: ast.AnnAssign, meaning: str) -> Parameter:
    name, annotation = statement.target.id, ast.unparse(statement.annotation)  # type: ignore[union-attr]
    try:
        default = ast.literal_eval(statement.value)  # type: ignore[arg-type]
    except ValueError:
        raise _syntax(statement, f"the default of {name} is not a literal") from None
    parameter = Parameter(name, annotation, _resolve(statement.annotation), default, meaning)
    try:
        return replace(parameter, default=parameter.check(default))
    except SettingsError as error:
        raise _syntax(statement, f"default of {error}".rstrip(".")) from None


def _syntax(node: ast.stmt, message: str) -> SyntaxError:
    return SyntaxError(message, ("parameters", node.lineno, node.col_offset, "", node.end_lineno, node.end_col_offset))


def _comments(source: str) -> dict[int, str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}


def _resolve(node: ast.expr) -> Any:
    """The type an annotation names, built from the names in `_TYPES` and Optional only: nothing is evaluated."""
    if isinstance(node, ast.Name) and node.id in _TYPES:
        return _TYPES[node.id]
    if isinstance(node, ast.Constant) and node.value is None:
        return None
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        arguments = tuple(... if isinstance(item, ast.Constant) and item.value is ... else _resolve(item) for item in inner)
        if node.value.id == "Optional":
            return Optional[arguments[0]]  # noqa: UP045 - built at run time
        if node.value.id in ("list", "dict", "tuple"):
            return _TYPES[node.value.id][arguments]
    plain = "int, float, str, bool, list[...], dict[...], Optional[...]"
    raise SyntaxError(f"type {ast.unparse(node)!r} is not plain ({plain})", ("", node.lineno, 0, ""))


def check_values(notebook: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values`, each known to the notebook and of its type; SettingsError with the closest match or the bad value."""
    known = parameters_of(notebook)
    for name in values:
        if name not in known:
            raise unknown(f"parameter of {notebook.parent.name}/{notebook.name}", name, known)
    return {name: known[name].check(value) for name, value in values.items()}
