"""The arguments that a shell script gives verl's trainer, expanded as far as text alone allows. Nothing is run.

Read are assignments, arrays, ``${X:-default}`` and the like, arithmetic, tests of strings and numbers, if and case.
Left as it stands, for the user to see, is what only a shell knows: command substitutions and unset variables. A
condition that can't be decided, and a loop, count as false.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

_SIGNS = ("&&", "||", ";;", ";", "|", "\n", "&", ")")
_CHAINS = ("&&", "||", "|")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?=)(.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$([A-Za-z_]\w*|[@*0-9])")
_BRACED = re.compile(r"([A-Za-z_]\w*|[@*0-9])(\[[@*]\])?(:?[-+=?]|,,|\^\^)?(.*)", re.DOTALL)
_LIST = re.compile(r'"?\$\{?(\w+|[@*])(\[[@*]\])?(?::\d+)?\}?"?')
_REDIRECTION = re.compile(r"\d*[<>].*")
_PREFIXES = ("export", "declare", "local", "readonly", "nohup", "exec", "time", "sudo")
_TRAINERS = re.compile(r"(verl|recipe)(?!.*(generation|eval))[\w.]*\.\w*main\w*")
_INTEGERS: Mapping[type, Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Mod: operator.mod,
    ast.FloorDiv: operator.floordiv,
}  # fmt: skip
_ORDERS: Mapping[str, Callable[[int, int], bool]] = {
    "-eq": operator.eq, "-ne": operator.ne, "-gt": operator.gt, "-ge": operator.ge, "-lt": operator.lt,
    "-le": operator.le,
}  # fmt: skip


@dataclass(frozen=True)
class Call:
    """A call of one of verl's trainers. undecided: what a case of the script asks, where nothing here says so."""

    module: str
    arguments: Sequence[str]
    undecided: Sequence[str]


def trainer_call(text: str, variables: Mapping[str, str]) -> Call | None:
    """Return the first call in a script, in a branch that isn't read where no other has one; None without any.

    variables: what the script finds set.
    """
    script = _Script(list(_tokens(text.replace("\r\n", "\n"))))
    script.variables |= {name: [value] for name, value in variables.items()}
    while script.tokens:
        script.block(True)
    found = script.call or script.unread_call
    return Call(found[0], found[1:], script.undecided) if found else None


def _end(text: str, at: int, quoted: bool = False) -> int:
    """Return the index after the character, quoted string, ``${...}`` or ``(...)`` that starts at ``at``."""
    if text[at] == "\\":
        return at + 2
    if text[at] == "'" and not quoted:
        return text.find("'", at + 1) + 1 or len(text)
    for opening, close, inside in (('"', '"', True), ("${", "}", quoted), ("$(", ")", False), ("(", ")", False)):
        if text.startswith(opening, at) and not (opening == "(" and quoted):
            at += len(opening)
            while at < len(text) and text[at] != close:
                is_comment = close == ")" and text[at] == "#" and text[at - 1].isspace()
                at = _end_of_line(text, at) if is_comment else _end(text, at, inside)
            return at + 1
    return at + 1


def _end_of_line(text: str, at: int) -> int:
    return text.find("\n", at) if "\n" in text[at:] else len(text)


def _tokens(text: str) -> Iterator[str]:
    """Yield words, as written, and the signs between commands."""
    at, word = 0, ""
    while at < len(text):
        sign = next((sign for sign in _SIGNS if text.startswith(sign, at)), "")
        if sign == "&" and word.endswith(">"):
            sign = ""
        if text[at] == "#" and not word:
            at = _end_of_line(text, at)
        elif sign or text[at].isspace() or text.startswith("\\\n", at):
            yield from (token for token in (word, sign) if token)
            word, at = "", at + (len(sign) or 1 + (text[at] == "\\"))
        else:
            end = _end(text, at)
            word, at = word + text[at:end], end
    if word:
        yield word


class _Script:
    """A script as it is read. tokens: those left; variables: what is known, a list for an array and one text else."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.variables: dict[str, list[str]] = {"HOME": ["~"], "PWD": ["."]}
        self.call: list[str] = []
        self.unread_call: list[str] = []
        self.undecided: list[str] = []

    def block(self, is_live: bool, *ends: str) -> tuple[str, bool]:
        """Read commands up to a word of ``ends``; return it, and whether the last command was true."""
        result = True
        while self.tokens:
            if self.tokens[0] in ends:
                return self.tokens.pop(0), result
            if self.tokens[0] in _SIGNS:
                self.tokens.pop(0)
            else:
                result = self._chain(is_live)
        return "", result

    def _chain(self, is_live: bool) -> bool:
        result = self._command(is_live)
        while self.tokens and self.tokens[0] in _CHAINS:
            sign = self.tokens.pop(0)
            while self.tokens and self.tokens[0] == "\n":
                self.tokens.pop(0)
            goes_on = is_live and {"&&": result, "||": not result, "|": False}[sign]
            result = self._command(goes_on) if goes_on else (self._command(False), result)[1]
        return result

    def _command(self, is_live: bool) -> bool:
        word = self.tokens.pop(0)
        if word == "if":
            self._if(is_live)
        elif word == "case":
            self._case(is_live)
        elif word in ("for", "while", "until", "select"):
            self.block(False, "do")
            self.block(False, "done")
        elif word == "{":
            return self.block(is_live, "}")[1]
        else:
            words = [word]
            while self.tokens and self.tokens[0] not in _SIGNS:
                words.append(self.tokens.pop(0))
            if words[0].endswith("()") and "=" not in words[0]:  # a function
                self.block(False, "}")
            elif is_live:
                return self._simple(words)
            elif not self.unread_call:
                self.unread_call = self._called(words)
        return is_live

    def _if(self, is_live: bool) -> None:
        word, is_done = "if", False
        while word in ("if", "elif", "else"):
            is_true = word == "else" or self.block(is_live and not is_done, "then")[1]
            is_read = is_live and not is_done and is_true
            word = self.block(is_read, "elif", "else", "fi")[0]
            is_done = is_done or is_read

    def _case(self, is_live: bool) -> None:
        subject = self._text(self.tokens.pop(0))
        end, is_done = self.block(False, "in")[0], False
        self.undecided += [subject] if is_live and "$" in subject else []
        while end not in ("esac", ""):
            patterns = list[str]()
            while self.tokens and self.tokens[0] not in (")", "esac"):
                patterns.append(self.tokens.pop(0))
            if not self.tokens or self.tokens.pop(0) == "esac":
                return
            is_match = any(fnmatchcase(subject, self._text(p)) for p in patterns if p not in _SIGNS)
            end = self.block(is_live and is_match and not is_done, ";;", "esac")[0]
            is_done = is_done or is_match

    def _simple(self, words: list[str]) -> bool:
        """Take in one command: an assignment, a test, or the call that is looked for."""
        while words and words[0] in _PREFIXES:
            words = words[1:]
        assigned = [found for word in words if (found := _ASSIGNMENT.fullmatch(word))]
        if len(assigned) == len(words):
            for name, sign, value in (found.groups() for found in assigned):
                self.variables[name] = [*(self.variables.get(name, []) if sign == "+=" else []), *self._assigned(value)]
            return True
        expanded = [text for word in words for text in self._expanded(word)]
        if expanded[:1] in (["["], ["[["], ["test"]):
            return _is_true([word for word in expanded[1:] if word not in ("]", "]]")])
        self.call = self.call or self._called(words)
        return expanded[:1] not in (["false"], ["source"], ["."])

    def _called(self, words: list[str]) -> list[str]:
        """Return the module of verl's that a command calls, and what it passes; nothing where it calls none."""
        at = next((at for at, word in enumerate(words) if _TRAINERS.fullmatch(word) and words[at - 1] == "-m"), None)
        given = words[at:] if at is not None else []
        return [text for word in given if not _REDIRECTION.fullmatch(word) for text in self._expanded(word)]

    def _assigned(self, value: str) -> list[str]:
        if not (value.startswith("(") and value.endswith(")")):
            return [self._text(value)]
        return [text for word in _tokens(value[1:-1]) if word not in _SIGNS for text in self._expanded(word)]

    def _expanded(self, word: str) -> list[str]:
        """Return the words that a word stands for: several for an array and for text with spaces, without quotes."""
        found = _LIST.fullmatch(word)
        if found and found[1] in ("@", "*"):
            return []  # the script's own arguments: it is read as called without any
        if found and found[2] and found[1] in self.variables:
            return self.variables[found[1]]
        text = self._text(word)
        return text.split() if found and not word.startswith('"') else [text]

    def _text(self, word: str, quoted: bool = False) -> str:
        """Return a word with its variables as their values, and without its quotes."""
        text, at = "", 0
        while at < len(word):
            end = _end(word, at, quoted)
            piece, name = word[at:end], _VARIABLE.match(word, at)
            if piece[0] == "\\":
                text += "" if piece == "\\\n" else piece if quoted and piece[1:] not in '$`"\\' else piece[1:]
            elif piece[0] == "'" and not quoted:
                text += piece[1:-1]
            elif piece[0] == '"':
                text += self._text(piece[1:-1], True)
            elif piece.startswith("$(("):
                text += self._integer(piece)
            elif piece.startswith("${"):
                text += self._braced(piece, quoted)
            elif name:
                text, end = text + self._value(name[1]), name.end()
            else:
                text += piece
            at = end
        return text

    def _value(self, name: str) -> str:
        return "" if name in "@*0123456789" else " ".join(self.variables.get(name, [f"${name}"]))

    def _braced(self, piece: str, quoted: bool) -> str:
        found = _BRACED.fullmatch(piece[2:-1])
        if found is None:
            return piece
        name, _, sign, rest = found.groups()
        is_set = name in self.variables and (not (sign or "").startswith(":") or bool(self._value(name)))
        match (sign or "")[-1:]:
            case "-" | "=":
                return self._value(name) if is_set else self._text(rest, quoted)
            case "+":
                return self._text(rest, quoted) if is_set else ""
            case "," | "^":
                return self._value(name).lower() if sign == ",," else self._value(name).upper()
        return piece if rest and sign is None else self._value(name)

    def _integer(self, piece: str) -> str:
        """Return the value of ``$((...))``, or what is written where it can't be known."""
        text = re.sub(r"[A-Za-z_]\w*", lambda name: self._value(name[0]), self._text(piece[3:-2]))
        try:
            return str(_evaluated(ast.parse(text.strip().replace("/", "//"), mode="eval").body))
        except (SyntaxError, ValueError, ZeroDivisionError):
            return piece


def _evaluated(node: ast.expr) -> int:
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluated(operand)
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _INTEGERS:
            return _INTEGERS[type(sign)](_evaluated(left), _evaluated(right))
    raise ValueError(ast.unparse(node))


def _is_true(words: list[str]) -> bool:
    """Whether a test holds; not where it asks for files, or for what isn't known."""
    match words:
        case ["!", *rest]:
            return not _is_true(rest)
        case ["-n", text] | [text]:
            return bool(text) and "$" not in text
        case ["-z", text]:
            return not text or "$" in text
        case [left, "=" | "==", right]:
            return left == right
        case [left, "!=", right]:
            return left != right and "$" not in left + right
        case [left, sign, right] if sign in _ORDERS and re.fullmatch(r"-?\d+ -?\d+", f"{left} {right}"):
            return _ORDERS[sign](int(left), int(right))
    return False
