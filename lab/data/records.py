"""From one record of any published file shape to an `Example`.

Shapes: the shared layout and COCONUT ({question, steps, answer}); GSM8K and its socratic and "gsm style" variants ({question,
answer} with a last line `#### x`); CODI ({question, cot, answer}); conversations and messages; TaH's problem/question +
output/solution/generation/answer; ProntoQA (as generated, and as COCONUT and Logic-LM store it); multiple choice as MMLU, ARC,
GPQA, AQuA and BIG-bench write it; the field names of MultiArith, SVAMP, GSM-Hard and AIME; and GSM8K-Aug's text lines.
"""

import hashlib
import random
import re
from collections.abc import Mapping
from typing import Any

from lab.errors import DataError

LETTERS = "ABCDEFGHIJ"
_QUESTION = ("question", "problem", "Problem", "Question", "question_concat", "sQuestion", "input", "inputs", "instruction")
_SOLUTION = ("output", "solution", "Solution", "generation")
_ANSWER = ("answer", "Answer", "final_ans", "final_answer", "target", "response", "answerKey", "correct")
_OPTION_PREFIX = re.compile(r"^\s*\(?[A-J]\s*\)\s*")

Parts = dict[str, Any]


def text_line(line: str, place: str) -> Parts:
    """`question||steps #### answer` (GSM8K-Aug's source): steps are cut at spaces, the answer is what follows the last `##`."""
    question, bar, rest = line.partition("||")
    if not bar or "##" not in rest:
        raise DataError(f"{place}: a line must read 'question||steps #### answer'.")
    return {"question": question, "steps": rest.split("##", 1)[0].split(), "answer": rest.rsplit("##", 1)[1].strip()}


def parts(record: Mapping[str, Any]) -> Parts:
    """The fields question, steps, answer, options and id that `record` holds, whatever its shape; absent ones are left out."""
    if isinstance(record.get("test_example"), Mapping):
        return parts({**record, **record["test_example"], "test_example": None})
    if isinstance(record.get("steps"), list) and "question" in record and "answer" in record:
        options = tuple(map(str, record.get("options") or ()))
        return {**record, "steps": [str(step) for step in record["steps"]], "options": options}
    if isinstance(turns := record.get("conversations") or record.get("messages"), list):
        return _conversation(turns)
    found = {"question": _first(record, _QUESTION), "steps": _steps(record), "answer": _first(record, _ANSWER), "options": ()}
    if record.get("Body"):
        found["question"] = f"{record['Body'].rstrip()} {record.get('Question', '').lstrip()}"
    if record.get("query"):
        found["question"] = f"{record.get('context') or record.get('question', '')} {record['query']}"
    elif record.get("context") and record.get("question"):
        found["question"] = f"{record['context']} {record['question']}"
    if isinstance(record.get("lSolutions"), list):
        found |= {"answer": record["lSolutions"][0], "steps": list(record.get("lEquations", []))}
    _choices(record, found)
    _solution(record, found)
    return found | {"id": _first(record, ("id", "ID", "qid", "unique_id", "iIndex"))}


def _first(record: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((record[name] for name in names if record.get(name) not in (None, "")), None)


def _steps(record: Mapping[str, Any]) -> list[str]:
    """The reasoning as a list: a `cot` of equations or sentences; a proof in pairs; a decomposition; lines of facts or a rationale."""
    if isinstance(cot := record.get("cot"), str):
        return cot.split() if cot.lstrip().startswith("<<") else [part for part in re.split(r"(?<=\.) ", cot.strip()) if part]
    if isinstance(proof := record.get("chain_of_thought"), list):
        return [" ".join(proof[i : i + 2]) for i in range(0, len(proof), 2)]
    if isinstance(record.get("decomposition"), list):
        return list(record["decomposition"])
    lines = record.get("facts") or record.get("rationale") or ""
    return lines.split("\n") if isinstance(lines, str) and lines else []


def _solution(record: Mapping[str, Any], found: Parts) -> None:
    """A solution text becomes steps; the answer is what follows `####`, else the last box, else the whole answer field."""
    answer, text = found["answer"], _first(record, _SOLUTION)
    if isinstance(answer, str) and "####" in answer:
        body, _, final = answer.rpartition("####")
        found["answer"] = final.strip()
        blocks = re.split(r"\n\s*\n", body.strip()) if "\n\n" in body.strip() else body.strip().split("\n")
        found["steps"] = found["steps"] or [line for line in blocks if line]
    elif isinstance(text, str):
        found["steps"] = found["steps"] or text.split("\n\n")
        if answer is None:
            found["answer"] = boxed(text) or text


def boxed(text: str) -> str:
    """The content of the last \\boxed{} or \\fbox{} with balanced braces, or ""."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return ""
    depth, begin = 0, text.index("{", start)
    for end in range(begin, len(text)):
        escaped = text[end - 1] == "\\"
        depth += (text[end] == "{" and not escaped) - (text[end] == "}" and not escaped)
        if depth == 0:
            return text[begin + 1 : end].strip()
    return ""


def _conversation(turns: list[Mapping[str, Any]]) -> Parts:
    """The last user and the last assistant turn; the answer is a box or `####` of the reply, else the reply after its thinking."""
    said: dict[str, str] = {}
    for turn in turns:
        role = {"human": "user", "gpt": "assistant"}.get(turn.get("from") or turn.get("role", ""), turn.get("from") or turn.get("role"))
        said[str(role)] = turn.get("value") or turn.get("content") or ""
    reply = said.get("assistant", "")
    thinking, closed, response = reply.partition("</think>")
    final = (response if closed else reply).strip()
    steps = [thinking.replace("<think>", "").strip()] if closed else []
    answer = boxed(final) or (final.rpartition("####")[2].strip() if "####" in final else final)
    return {"question": said.get("user"), "steps": [step for step in steps if step], "answer": answer, "options": (), "reply": reply}


def _choices(record: Mapping[str, Any], found: Parts) -> None:
    """Options without their "A)" and the answer as a letter; where the source puts the right one first, a fixed shuffle by question."""
    options = record.get("options") or record.get("choices") or []
    if isinstance(options, Mapping):
        labels = [str(label) for label in options["label"]]
        found |= {"options": tuple(options["text"]), "answer": LETTERS[labels.index(str(found["answer"]))] if found["answer"] else None}
    elif options:
        found["options"] = tuple(_OPTION_PREFIX.sub("", str(option)) for option in options)
        if isinstance(found["answer"], int) and not isinstance(found["answer"], bool):
            found["answer"] = LETTERS[found["answer"]]
    elif "Correct Answer" in record:
        right = record["Correct Answer"]
        _shuffled(found, right, [right, *(record[f"Incorrect Answer {i}"] for i in (1, 2, 3))])
    elif record.get("multiple_choice_targets"):
        options, scores = record["multiple_choice_targets"], record["multiple_choice_scores"]
        _shuffled(found, options[scores.index(max(scores))], options)


def _shuffled(found: Parts, right: str, options: list[str]) -> None:
    order = list(range(len(options)))
    random.Random(hashlib.sha256(str(found["question"]).encode()).hexdigest()).shuffle(order)
    found["options"] = tuple(str(options[i]).strip() for i in order)
    found["answer"] = LETTERS[order.index(list(options).index(right))]
