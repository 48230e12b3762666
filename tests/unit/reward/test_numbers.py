"""final_number against cases by hand, spellings of random numbers, and GSM8K."""

from __future__ import annotations

import time
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeopd.reward.numbers import final_number, reference_number

CASES = [
    ("#### 72", "72"),
    ("3 + 4 = 7\n#### 1,234", "1234"),
    ("#### $1,234,567.50", "1234567.5"),
    ("#### -5", "-5"),
    ("#### \u22125", "-5"),
    ("#### 50%", "50"),
    ("#### 10\n#### 12", "12"),
    ("#### 12 apples, or 24 halves", "12"),
    ("#### Conclusion\nSo it is 9.", "9"),
    (r"so \boxed{42}, not 43", "42"),
    (r"\boxed{1} then \boxed{\frac{3}{4}}", "3/4"),
    (r"\boxed{\text{about } 7}. 8", "7"),
    (r"\boxed{-\frac{1}{2}}", "-1/2"),
    (r"\boxed{2\frac{1}{2}}", "5/2"),
    (r"it costs \$1{,}200.", "1200"),
    (r"$1\,200$ and 5\%", "5"),
    ("The answer is 1,000.", "1000"),
    ("between 5-10", "10"),
    ("10-5", "5"),
    ("= -$7.25", "-7.25"),
    ("= $-7.25", "-7.25"),
    ("€3", "3"),
    ("3/4.", "3/4"),
    ("1 1/2 cups", "3/2"),
    ("-1 1/2", "-3/2"),
    ("$.50", "1/2"),
    ("the answer is...5", "5"),
    ("1.5e3", "1500"),
    ("答案是-5", "-5"),
    ("答案是42个", "42"),
    ("we need H2O: 3 of it", "3"),
    ("5kg", "5"),
]


@pytest.mark.parametrize(("text", "expected"), CASES)
def test_final_number(text: str, expected: str) -> None:
    assert final_number(text) == Fraction(expected)


MATH = [
    ("\\boxed{\\frac{3}{4}}", "3/4"),
    ("\\boxed{-\\frac{3}{4}}", "-3/4"),
    ("\\boxed{\\frac{-3}{4}}", "-3/4"),
    ("\\boxed{\\frac{3}{-4}}", "-3/4"),
    ("\\boxed{\\frac12}", "1/2"),
    ("\\boxed{\\frac34}", "3/4"),
    ("\\boxed{\\frac{1}2}", "1/2"),
    ("\\boxed{\\dfrac{11}{2}}", "11/2"),
    ("\\boxed{\\cfrac{1}{2}}", "1/2"),
    ("\\boxed{\\frac{\\frac{1}{2}}{3}}", "1/6"),
    ("\\boxed{\\frac{1.5}{3}}", "1/2"),
    ("\\boxed{2\\sqrt{3}}", None),
    ("\\boxed{\\frac{\\pi}{2}}", None),
    ("\\boxed{10^{5}}", "100000"),
    ("\\boxed{10^5}", "100000"),
    ("\\boxed{2^{10}}", "1024"),
    ("\\boxed{x^2+1}", None),
    ("\\boxed{5!}", "120"),
    ("\\boxed{(3,4)}", None),
    ("\\boxed{\\{1,2,3\\}}", None),
    ("\\boxed{1,2,3}", None),
    ("\\boxed{12\\text{ cm}^2}", "12"),
    ("\\boxed{12\\ \\text{cm}^3}", "12"),
    ("\\boxed{90^\\circ}", "90"),
    ("\\boxed{5 \\times 10^{3}}", "5000"),
    ("\\boxed{3.0\\times10^{8}}", "300000000"),
    ("The answer is 1,234,567.", "1234567"),
    ("#### 1,000", "1000"),
    ("#### -5", "-5"),
    ("####-5", "-5"),
    ("#### $1,234.50", "2469/2"),
    ("#### 5 apples", "5"),
    ("#### The answer is 5", "5"),
    ("####", None),
    ("so 3 + 4 = 7.", "7"),
    ("x = -3", "-3"),
    ("it is \u22123", "-3"),
    ("\u20133", "-3"),
    ("negative 3", "-3"),
    ("minus five", None),
    ("50%", "50"),
    ("0.5", "1/2"),
    (".5", "1/2"),
    ("1e3", "1000"),
    ("1.5e-3", "3/2000"),
    ("1/2", "1/2"),
    ("3 1/2", "7/2"),
    ("1 / 2", "1/2"),
    ("10-5", "5"),
    ("10 - 5 = 5", "5"),
    ("(-4)", "-4"),
    ("$-4$", "-4"),
    ("-$4", "-4"),
    ("$ 4", "4"),
    ("4 dollars and 50 cents", None),
    ("1.000.000", "1000000"),
    ("1 000 000", "1000000"),
    ("1_000", "1000"),
    ("2,5", None),
    ("5:30", None),
    ("12/25/2024", None),
    ("answer: 5\n\nStep 2", "5"),
    ("The final answer is $\\boxed{42}$. I hope this helps with question 3!", "42"),
    ("\\boxed{42} and \\boxed{}", "42"),
    ("\\boxed{", None),
    ("\\boxed 5", "5"),
    ("\\fbox{5}", "5"),
    ("\\boxed{\\text{5}}", "5"),
    ("\\boxed{ 5 }", "5"),
    ("\\boxed{x=5}", "5"),
    ("\\boxed{5\\%}", "5"),
    ("\\boxed{\\$5}", "5"),
    ("\\boxed{5{,}000}", "5000"),
    ("\\boxed{5\\,000}", "5000"),
    ("\\boxed{5\\!000}", "5000"),
    ("\\boxed{1{,}234{,}567}", "1234567"),
    ("\\boxed{4.\\overline{3}}", None),
    ("42.", "42"),
    ("42.0", "42"),
    ("042", "42"),
    ("0x10", None),
    ("abc123", None),
    ("v2.5", None),
    ("3rd", "3"),
    ("Chapter 2: 7", "7"),
    ("#### 72\n#### 73", "73"),
    ("**5**", "5"),
    ("5²", None),
    ("½", "1/2"),
    ("√2", None),
    ("3π", None),
    ("±5", None),
    ("٣", "3"),
    ("1,23", None),
    ("1,234,56", None),
    ("12,345", "12345"),
    ("1234,567", None),
    ("in 2023 1/2 of", "1/2"),
    ("5 - 3/4", None),
    ("3-1/2", None),
    ("<think>12</think>", None),
    ("#### 5.", "5"),
    ("1e400", None),
    ("so $x = 2\\sqrt{3}$.", None),
    ("Thus $\\frac{-3}{4}$.", "-3/4"),
    ("it costs $5 and she paid $3.", "3"),
    ("7\\sqrt{3}", None),
    ("The answer is 3 + 4 = 7.", "7"),
    ("$3/hour", "3"),
    ("5 million", None),
    ("#### 2\\sqrt{3}", None),
    ("in [1, 5)", None),
    ("\\boxed{[1,5)}", None),
    ("\\boxed{(-\\infty, 3]}", None),
    ("\\boxed{5\\text{ or }7}", None),
    ("\\boxed{5 \\text{ hours } 30 \\text{ minutes}}", None),
    ("\\boxed{x=1, y=2}", None),
    ("\\boxed{101_2}", None),
    ("\\boxed{3i}", None),
    ("\\boxed{2\\pi}", None),
    ("\\boxed{3x}", None),
    ("\\boxed{3 + 4}", None),
    ("\\boxed{5\\text{ million}}", None),
    ("\\boxed{9^{9^{9}}}", None),
    ("\\boxed{-2^2}", "-4"),
    ("\\boxed{7 \\frac 12}", "15/2"),
    ("\\boxed{\\frac{1}{0}}", None),
    ("<think> so 3 </think> The answer is 5", "5"),
    ("<think>\\boxed{3}", None),
    ("x^2", None),
    ("5/h", None),
    ("- 5 apples", "5"),
    ("$5$ apples, as $x^2$ is", None),
    ("\\(12\\)", "12"),
    ("\\boxed{2.5\\times 10^{-3}\\text{ m/s}}", "1/400"),
    ("an open \\boxed{5", None),
]


@pytest.mark.parametrize(("text", "expected"), MATH)
def test_one_number_or_none(text: str, expected: str | None) -> None:
    assert final_number(text) == (None if expected is None else Fraction(expected))


def test_equal_surds_are_no_number_on_either_side() -> None:
    """`7\\sqrt{3}` must not match `2\\sqrt{3}` because both end in 3."""
    assert reference_number(r"2\sqrt{3}") is None
    assert final_number(r"\boxed{7\sqrt{3}}") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("First 3 apples, then 4", None),
        ("The answer is 5 because 2 +", None),
        ("so \\boxed{42}. Let me check that 6 * 7", "42"),
        ("so \\boxed{4", None),
        ("#### 12\nLet me check", "12"),
        ("#### 12", None),
    ],
)
def test_truncated_reasoning_has_a_number_only_where_it_is_marked(text: str, expected: str | None) -> None:
    assert final_number(text, truncated=True) == (None if expected is None else Fraction(expected))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2 + 3 = 5\n#### 5", "5"),
        ("72", "72"),
        (r"\frac{3}{4}", "3/4"),
        (r"so it is \boxed{7}.", "7"),
        ("12 apples", "12"),
        ("She has 5 apples and 3 pears", None),
        ("(3,4)", None),
        ("x^2 + 1", None),
        ("3:30", None),
    ],
)
def test_references(text: str, expected: str | None) -> None:
    assert reference_number(text) == (None if expected is None else Fraction(expected))


@pytest.mark.parametrize("text", ["", "none", "####", "7/0", "H2O", "x" * 100, "9" * 5000, "NaN", "Infinity"])
def test_no_number(text: str) -> None:
    assert final_number(text) is None


@given(
    st.decimals(min_value=-(10**12), max_value=10**12, allow_nan=False, places=3),
    st.text(alphabet="ab \n.,", max_size=20),
)
def test_written_with_separators_it_reads_back(value: Decimal, before: str) -> None:
    assert final_number(f"{before} {value:,f}.") == Fraction(value)


@given(st.text(alphabet="0123456789.,/ -+*^!(){}$%=\\\\fraceqtinx\u221a\u00bd#\n", max_size=60))
def test_any_text_has_a_number_or_none(text: str) -> None:
    assert final_number(text, truncated=True) in (None, final_number(f"{text}\n"))
    assert reference_number(text) is None or final_number(text) is not None


@pytest.mark.parametrize(
    "text",
    [
        "1" * 200_000,
        "1,111" * 40_000,
        "1/" * 100_000,
        "-" * 200_000,
        "1 " * 100_000,
        "\\boxed{" * 30_000,
        "####" * 50_000,
        "$ " * 100_000,
        "\\frac{1}" * 20_000,
        "1." * 100_000,
        "answer is " * 30_000,
        "\\boxed{" + "aaa" * 300 + "!}",
        "\\(" * 60_000,
        "#### 1 " * 30_000,
        "{" * 900 + "1" + "}" * 900,
        "\\boxed{" + "(" * 900 + "1}",
    ],
)
def test_long_responses_take_linear_time(text: str) -> None:
    start = time.perf_counter()
    final_number(text)
    assert time.perf_counter() - start < 2.0
