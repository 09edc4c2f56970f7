"""The lenient rules, sentence by sentence: what is cut, which marker wins, and how each kind of answer is read and compared."""

import os
import threading

import pytest

from lab.data import load_benchmark
from lab.data.answers import lenient, same

NUMBERS = [
    # 1 what is cut first
    ("18<|im_end|>", "18"),
    ("#### 18</s><|endoftext|>", "18"),
    ("<|im_end|>", None),
    ("<think>the answer is 3</think>so it is 4", "4"),
    ("<think>#### 3</think> a </think> 5", "5"),
    ("<think>7</think>", None),
    ("#### 18\nQuestion: How many is 7?", "18"),
    ("18\nQ: what is 5?\nA: 5", "18"),
    ("  Question: what? 7", "7"),
    ("Question: 5?\nIt is 7\nQuestion: 9", "7"),
    ("Our Question: 7", "7"),
    ("\nQuestion: what is 7?", None),
    # 2 explicit markers
    ("first #### 18 then 20", "18"),
    ("### 18", "18"),
    ("###18", "18"),
    ("### -5", "-5"),
    ("### Step 2\nso it is 18", "18"),
    ("#### 18\n### Step 3: check 20", "18"),
    ("### 2. Add them\n5 and 6 make 11", "11"),
    ("### Final Answer\n18", "18"),
    ("## 3\nso 18", "18"),
    ("\\boxed{18} of 20", "18"),
    ("\\fbox{18} of 20", "18"),
    ("\\boxed 2 of 20", "2"),
    ("$\\boxed2$ of 20", "2"),
    ("\\boxed{\\frac{1}{2}} of 20", "0.5"),
    ("The answer is 18, of 20", "18"),
    ("THE FINAL ANSWER IS 18 of 20", "18"),
    ("the final answer is: 18 of 20", "18"),
    ("answer: 18 of 20", "18"),
    ("**Answer:** 18 of 20", "18"),
    ("**Final Answer**: 18 of 20", "18"),
    ("\\boxed{3} then #### 4", "4"),
    ("#### 4 then \\boxed{3}", "3"),
    ("the answer is 5. #### 6", "6"),
    ("#### 18\n#### ", "18"),
    ("\\boxed{18} and \\boxed{}", "18"),
    ("The answer is 18. The answer is", "18"),
    ("#### \nso 18 it is", "18"),
    ("so \\boxed{18", "18"),
    ("so \\boxed{\\frac{1}{2}", "0.5"),
    ("\\boxed{\\boxed{18}} of 20", "18"),
    ("\\boxed{17 \\boxed{18}} of 20", "18"),
    ("\\boxed{\\{18\\}} of 20", "18"),
    ("\\boxed{\\text{It is } 18} of 20", "18"),
    ("#### none of the 5", "5"),
    ("I have 5 of them. #### unknown", None),
    # 3 and 4 without a marker: the last number, or nothing
    ("3 apples and 4 pears are 7 fruits", "7"),
    ("no number", None),
    ("", None),
    # 5 the first on the marker's line, or behind its last equals sign
    ("#### 18 of 20", "18"),
    ("#### 18\n20", "18"),
    ("#### 3 + 4 = 7", "7"),
    ("#### 3 = 3 = 8 of 9", "8"),
    ("\\boxed{x = 5}", "5"),
    ("The answer is $x=5$.", "5"),
    ("#### 18 = eighteen", "18"),
    # dropped: currency, units, percent, markdown, quotes, dollars, a period
    ("#### $18", "18"),
    ("#### 18$", "18"),
    ("#### 18 €", "18"),
    ("#### £1.50", "1.5"),
    ("#### \\$18.90", "18.9"),
    ("#### US$18", "18"),
    ("#### 18 dollars", "18"),
    ("#### 18km", "18"),
    ("#### 25%", "25"),
    ("\\boxed{25\\%}", "25"),
    ("#### **18**", "18"),
    ("#### *18*", "18"),
    ("#### _18_", "18"),
    ("#### `18`", "18"),
    ('#### "18"', "18"),
    ("#### “18”", "18"),
    ("#### $18$", "18"),
    ("#### \\(18\\)", "18"),
    ("The answer is 18.", "18"),
    ("The answer is $18.$", "18"),
    # thousands
    ("#### 1,234,567", "1234567"),
    ("#### 1 234 567", "1234567"),
    ("#### 1\u00a0234", "1234"),
    ("#### 1\u202f234", "1234"),
    ("#### 1\u2009234", "1234"),
    ("#### 1_234", "1234"),
    ("#### 1{,}234", "1234"),
    ("#### 10,\\!080", "10080"),
    ("#### 10\\!080", "10080"),
    ("#### 11,\\! 111,\\! 111", "11111111"),
    ("#### 1,234.5", "1234.5"),
    ("#### 1, 2", "1"),
    ("#### 1,23", "1"),
    ("#### 12 14", "12"),
    ("10 12 14", "14"),
    # a point is always decimal
    ("#### 1.234", "1.234"),
    ("#### .5", "0.5"),
    ("#### 5.", "5"),
    ("#### 018", "18"),
    ("#### 18.0", "18"),
    # signs
    ("3-5", "5"),
    ("10 - 5", "5"),
    ("pages 3–5", "5"),
    ("#### 3-5", "3"),
    ("#### -5", "-5"),
    ("#### \u22125", "-5"),
    ("#### –5", "-5"),
    ("#### －5", "-5"),
    ("#### - 5", "-5"),
    ("#### -$5", "-5"),
    ("#### $-5", "-5"),
    ("#### \\$-5", "-5"),
    ("3, -5", "-5"),
    ("x = -5", "-5"),
    ("it is (-5)", "-5"),
    ("negative 10", "-10"),
    ("#### Negative 10", "-10"),
    ("#### minus 3", "-3"),
    ("minus $3", "-3"),
    ("7 minus 3", "3"),
    ("- 3 apples\n- 4 pears", "4"),
    # exponents
    ("#### 1.5e6", "1500000"),
    ("#### 1.5E+6", "1500000"),
    ("#### 1.5e-3", "0.0015"),
    ("#### 1.5 x 10^6", "1500000"),
    ("#### 1.5 × 10^6", "1500000"),
    ("#### 1.5 \\times 10^{6}", "1500000"),
    ("#### 1.5\\cdot10^6", "1500000"),
    ("#### 1.5 × 10⁶", "1500000"),
    ("#### 1.5 × 10⁻³", "0.0015"),
    ("#### 1.5 X 10^(-3)", "0.0015"),
    ("#### 10^6", "1000000"),
    ("#### -2 \\times 10^{-3}", "-0.002"),
    # fractions
    ("#### 3/4", "0.75"),
    ("#### 1/3", "1/3"),
    ("#### -3/4", "-0.75"),
    ("#### \\frac{3}{4}", "0.75"),
    ("#### \\dfrac34", "0.75"),
    ("#### -\\frac{3}{4}", "-0.75"),
    ("#### 1 1/2", "1.5"),
    ("#### -1 1/2", "-1.5"),
    ("#### 1\\frac{1}{2}", "1.5"),
    ("#### ½", "0.5"),
    ("#### 1½ cups", "1.5"),
    ("#### 2 ¾", "2.75"),
    ("#### 3⁄4", "0.75"),
    ("#### 1/0", None),
    # digits of other scripts
    ("#### １８", "18"),
    ("#### １，２３４．５", "1234.5"),
    ("#### ٣", "3"),
    ("#### १८", "18"),
    # an exponent of a unit is no number
    ("25 m^2", "25"),
    ("25 m²", "25"),
    ("25 \\text{ cm}^2", "25"),
    ("25 cm^{3}", "25"),
    ("25 m**2", "25"),
    ("25 m2", "25"),
    ("5 m s^{-1}", "5"),
    ("7 mol of H2O", "7"),
    ("a5 = 3 and x_2", "3"),
    ("9" * 5000, None),
    ("1e999999999", None),
]


@pytest.mark.parametrize(("text", "answer"), NUMBERS, ids=range(len(NUMBERS)))
def test_numbers(text, answer):
    assert lenient(text, "gsm8k") == answer


@pytest.mark.parametrize(
    ("answer", "gold", "equal"),
    [
        ("18", "18.0", True),
        ("18", "018", True),
        ("17.9999", "18", False),
        ("18.0000000000000000001", "18", False),
        ("1000", "1,000", True),
        ("0.5", "1/2", True),
        ("1/3", "0.3333333333333333", False),
        ("-0", "0", True),
        (None, "18", False),
        ("18", "inf", False),
        ("123456789012345678901", "123456789012345678902", False),
    ],
)
def test_numbers_compare_exactly(answer, gold, equal):
    assert same(answer, gold, "gsm8k") is equal


@pytest.mark.parametrize(
    ("answer", "gold", "equal"),
    [
        ("1000000.9", "1000000", True),
        ("1000002", "1000000", False),
        ("-9867630.5", "-9867630", True),
        ("0.0000009", "0", True),
        ("0.000002", "0", False),
        ("0.0000000000009", "0.0000000000005", False),
        ("388147.411764", "388147.4117647059", True),
    ],
)
def test_gsm_hard_tolerance_is_relative(answer, gold, equal):
    assert same(answer, gold, "gsm_hard") is equal
    assert not same(answer, gold, "gsm8k") or answer == gold


LETTERS = [
    ("Answer: Option C", "C"),
    ("\\boxed{\\text{Option C}}", "C"),
    ("Answer: Choice: (d)", "D"),
    ("The answer is (B).", "B"),
    ("the correct option is C", "C"),
    ("The correct option is D) 42", "D"),
    ("Answer: **C**", "C"),
    ("Answer: option C", "C"),
    ("#### b", "B"),
    ("the answer is 'B'", "B"),
    ('"B"', "B"),
    ("[b]", "B"),
    ("#### B.", "B"),
    ("\\boxed{B}", "B"),
    ("\\boxed{(B)}", "B"),
    ("\\boxed{\\text{(C)}}", "C"),
    ("\\boxed{\\textbf{(D)}\\ 42}", "D"),
    ("\\boxed{\\text{E. None}}", "E"),
    ("first (A), no, (D)", "D"),
    ("first (a), no, (d) then", "D"),
    ("B", "B"),
    ("b.", "B"),
    ("**B**", "B"),
    ("(B)", "B"),
    ("I think B is right", None),
    ("The answer is A because it fits", "A"),
    ("The answer is a", "A"),
    ("The answer is A.", "A"),
    ("The answer is a good question", None),
    ("The answer is A triangle", None),
    ("The answer is Boron", None),
    ("\\boxed{Boron}", None),
    ("\\boxed{42}", None),
    ("Answer: none of them (E)", "E"),
    ("Answer: E = mc^2", None),
    ("f(b) and g(x)", None),
    ("A good start", None),
    ("(G)", None),
    ("", None),
    ("<think>(A)</think>(B)", "B"),
    ("### Step A\n(C)", "C"),
    ("### B", "B"),
]


@pytest.mark.parametrize(("text", "answer"), LETTERS, ids=range(len(LETTERS)))
def test_letters(text, answer):
    assert lenient(text, "aqua") == answer


def test_letters_compare_without_case_and_marks():
    assert same("B", "(b).", "aqua") and not same("B", "C", "aqua") and not same(None, "A", "aqua")


YES_NO = [
    ("I would say 'yes'", "yes"),
    ("I don't know: ‘no’.", "no"),
    ("no's", None),
    ("yes", "yes"),
    ("No.", "no"),
    ("It is true.", "yes"),
    ("That is FALSE", "no"),
    ("Yes, at first, but no", "no"),
    ("The answer is yes. No doubt.", "yes"),
    ("#### True", "yes"),
    ("\\boxed{\\text{No}}", "no"),
    ("**Yes**", "yes"),
    ("I do not know", None),
    ("nobody cannot", None),
    ("notable, yesterday, falsely", None),
    ("The answer is not known", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "answer"), YES_NO, ids=range(len(YES_NO)))
def test_yes_and_no(text, answer):
    assert lenient(text, "strategyqa") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [("True", "True"), ("no", "False"), ("yes", "True"), ("(A)", "True"), ("B", "False"), ("The correct option is B", "False")]
    + [("### False", "False"), ("The statement is true. (A)", "True"), ("A good day", None), ("(C)", None)],
)
def test_prontoqa(text, answer):
    assert lenient(text, "prontoqa") == answer
    assert answer is None or same(answer, answer, "prontoqa")


def test_true_is_yes():
    assert same("yes", "True", "strategyqa") and same("False", "no", "strategyqa") and not same("yes", "no", "strategyqa")


SENTENCES = [
    ("so 'Sally is a sterpus.'", "Sally is a sterpus."),
    ("### Sally is a sterpus.", "Sally is a sterpus."),
    ("Every lempus is a rempus. Tom is a lempus. Tom is an impus.", "Tom is a impus."),
    ("tom  is a\nlempus", "Tom is a lempus."),
    ("So, Tom is a lempus", "Tom is a lempus."),
    ("**Tom is a lempus.**", "Tom is a lempus."),
    ("\\boxed{\\text{Tom is a lempus}}", "Tom is a lempus."),
    ("The answer is: Tom is a lempus.", "Tom is a lempus."),
    ("Every lempus is a rempus.", None),
    ("Is Tom a lempus or a rempus?", None),
    ("Tom is a lempus or a rempus.", None),
    ("Tom is not a lempus.", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "answer"), SENTENCES, ids=range(len(SENTENCES)))
def test_prosqa(text, answer):
    assert lenient(text, "prosqa") == answer


def test_prosqa_needs_name_and_word():
    gold = "Sally is a impus."
    assert same("Sally is an impus", gold, "prosqa") and same("sally  is a impus.", gold, "prosqa")
    for wrong in ("Tom is a impus.", "Sally is a sterpus.", "impus", "", None):
        assert not same(wrong, gold, "prosqa")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed{1} and \\boxed{2}", "2"),
        ("\\boxed{\\boxed{2}}", "2"),
        ("\\boxed{2} or \\boxed{}", "2"),
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
        ("\\boxed{\\frac{1}{2", "\\frac{1}{2"),
        ("The answer is $\\frac12$.", "\\frac12"),
        ("The final answer is: $$x^2$$", "x^2"),
        ("the answer is \\(x\\)", "x"),
        ("The answer is $\\$18.90$", "\\$18.90"),
        ("The answer is 5", None),
        ("#### 5", None),
        ("it is $5$", None),
        ("so 5", None),
        ("<think>\\boxed{1}</think> hm", None),
    ],
)
def test_latex_is_read_from_a_box_or_behind_the_answer_is(text, answer):
    assert lenient(text, "math500") == answer


EQUAL = [
    ("$\\frac12$", "0.5"), ("\\dfrac{1}{2}", "\\frac{1}{2}"), ("\\tfrac12", "1/2"), ("\\frac1{2}", "\\frac{1}2"), ("1\\frac12", "1.5"),
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})"), ("p-q", "-q + p"), ("2\\sqrt{2}", "\\sqrt8"),
    ("(x+1)^2", "x^2+2x+1"), ("58,500", "58500"), ("10,\\!080", "10080"), ("11,\\! 111,\\! 111,\\! 100", "11111111100"),
    ("\\$32,\\!348", "32348"), ("14.0", "14"), ("5\\text{ cm}", "5"), ("5 cm", "5"), ("864 \\mbox{ inches}^2", "864"),
    ("15\\mbox{ cm}^2", "15"), ("5.4 \\text{ cents}", "5.4"), ("\\frac{270}7\\text{ degrees}", "\\frac{270}{7}"), ("90^\\circ", "90"),
    ("90^{\\circ}", "90°"), ("50\\%", "50"), ("\\$18.90", "18.9"), ("x=5", "5"), ("x \\in [-2,7]", "[-2,7]"), ("y = 2x+3", "2x + 3"),
    ("3,5,7", "7, 5, 3"), ("\\{1,2\\}", "\\{2,1\\}"), ("1,-2", "\\{-2,1\\}"), ("\\{1\\pm\\sqrt{5},-2\\}", "-2, 1+\\sqrt5, 1-\\sqrt5"),
    ("\\pm 3", "-3,3"), ("x=1 \\text{ or } x=-2", "1,-2"), ("1 \\text{ and } 2", "2,1"),
    ("1, 2, \\text{and } 3", "3,2,1"), ("\\text{18 dollars}", "18"), ("18\\$", "18"),
    ("\\[ 5 \\]", "5"), ("\\mathrm{e}^2", "e^{2}"), ("\\{(1,2),(3,4)\\}", "(3,4),(1,2)"), ("(−∞, 5]", "(-\\infty,5]"),
    ("(-\\infty,0)\\cup(1,2]", "(1,2] \\cup (-\\infty, 0)"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2.0 \\end{pmatrix}"), ("evelyn", "\\text{Evelyn}"),
    ("\\text{ Evelyn }.", "\\text{Evelyn}"), ("B", "\\text{(B)}"), ("\\textbf{(b)}", "\\text{(B)}"), ("1.25\\times 10^{3}", "1250"),
    ("2\\pi", "2π"), ("\\infty", "∞"), ("\\frac{\\sqrt3}{3}", "\\frac{1}{\\sqrt{3}}"), ("x+y=5", "y+x=5"),
    ("\\text{June } 20", "\\text{June 20}"), ("$5$.", "5"), ("(5)", "5"), ("-\\frac{3}{4}", "\\frac{-3}{4}"), ("\\text{even}", "even"),
]  # fmt: skip
DIFFERENT = [
    ("(1,2)", "\\{1,2\\}"), ("(1,2)", "(2,1)"), ("[0,1]", "[0,1)"), ("(0,1)", "[0,1]"), ("[1,2]", "[2,1]"), ("1,2", "(1,2)"),
    ("3,5", "3,5,7"), ("90^\\circ", "\\frac{\\pi}{2}"), ("\\frac{\\pi}{2}", "90^\\circ"), ("1\\text{ m}", "100\\text{ cm}"),
    ("58,500", "500,58"), ("50\\%", "0.5"), ("1.414214", "\\sqrt2"), ("0.333333", "\\frac13"), ("17.9999", "18"), ("x", "y"),
    ("5x", "5"), ("y=2x+3", "y=2x+4"), ("\\text{no}", "\\text{yes}"), ("C", "\\text{(D)}"), ("", "5"), ("\\text{}", "5"),
    ("3.14", "\\pi"), ("\\pm 3", "3"), ("2^{99999999}", "2^{99999998}"), ("\\frac{1}{", "1"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "gold"), EQUAL, ids=range(len(EQUAL)))
def test_latex_that_is_equal(answer, gold):
    assert same(answer, gold, "math500") and same(gold, answer, "math500")


@pytest.mark.parametrize(("answer", "gold"), DIFFERENT, ids=range(len(DIFFERENT)))
def test_latex_that_differs(answer, gold):
    assert not same(answer, gold, "math500")


def test_latex_outside_the_main_thread():
    found = []
    thread = threading.Thread(target=lambda: found.extend([same("a+b+1", "1+b+a", "math500"), same("a+b+1", "b+a+2", "math500")]))
    thread.start()
    thread.join()
    assert found == [True, False]


REAL = ["gsm8k", "gsm_hard", "svamp", "aime24", "amc23", "math500", "olympiadbench", "aqua", "strategyqa", "prontoqa", "prosqa"]


@pytest.mark.skipif(not os.environ.get("LAB_DATA"), reason="LAB_DATA names no folder with real benchmark data")
@pytest.mark.parametrize(
    "name", ["gsm8k", "gsm_hard", "svamp", "aime24", "amc23", "math500", "olympiadbench", "aqua", "strategyqa", "prontoqa", "prosqa"]
)
def test_every_real_gold_answer_is_found_and_right(name):
    for example in load_benchmark(name, "test", os.environ["LAB_DATA"]):
        for text in (f"So it is \\boxed{{{example.answer}}}.", f"The answer is ${example.answer}$."):
            if "$" not in example.answer or "boxed" in text:
                assert same(lenient(text, name), example.answer, name), (text, lenient(text, name))
