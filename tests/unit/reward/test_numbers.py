"""final_number against hand-made cases, its own spelling of random numbers, and GSM8K."""

from __future__ import annotations

import time
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeopd.reward.numbers import final_number

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
    (r"an open \boxed{5", "5"),
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
    ("on 12/05/2024", "2024"),
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


@pytest.mark.parametrize("text", ["", "none", "####", "7/0", "H2O", "x" * 100, "9" * 5000, "NaN", "Infinity"])
def test_no_number(text: str) -> None:
    assert final_number(text) is None


@given(
    st.decimals(min_value=-(10**12), max_value=10**12, allow_nan=False, places=3),
    st.text(alphabet="ab \n.,", max_size=20),
)
def test_written_with_separators_it_reads_back(value: Decimal, before: str) -> None:
    assert final_number(f"{before} {value:,f}.") == Fraction(value)


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
    ],
)
def test_long_answers_take_linear_time(text: str) -> None:
    start = time.perf_counter()
    final_number(text)
    assert time.perf_counter() - start < 2.0
