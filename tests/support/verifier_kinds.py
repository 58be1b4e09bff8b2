r"""Pairs of answers by the kind of mistake that they guard against, each kind in both directions.

KINDS: kind -> (pairs that are the same answer, pairs that are not). STATED: (response, reference, whether it is right,
modes in which it is looked at: "a" anywhere, "l" answer line).
"""

# ruff: noqa: RUF001  the signs of mathematics and of text are meant as they stand

Pairs = tuple[tuple[str, str], ...]

_B_INVERSE = r"B^{-1}=\begin{pmatrix}3&7\\5&12\end{pmatrix}"

KINDS: dict[str, tuple[Pairs, Pairs]] = {
    "a sum may be exactly 0": (
        (
            (r"\frac{1+(-1)^n}{2}", r"\frac{(-1)^n+1}{2}"),
            ("(-1)^n+1", "1+(-1)^{n+2}"),
            (r"1+\cos(n\pi)", "1+(-1)^n"),
            (r"\cosh x-\sinh x", "e^{-x}"),
        ),
        (
            (r"\frac{1+(-1)^n}{2}", "1"),
            (r"\frac{1-(-1)^n}{2}", "0"),
            (r"\frac{2(1+(-1)^n)}{n\pi}", r"\frac{4}{n\pi}"),
            ("n(1+(-1)^n)", "2n"),
            ("2^n+(-2)^n", "2^{n+1}"),
            (r"\frac{1+\cos(n\pi)}{2}", "1"),
            (r"\frac{1+(-1)^x}{2}", "1"),
            (r"y=\frac{1+(-1)^n}{2}", "y=1"),
            (r"\cosh x - \sinh x", "e^{-2x}"),
            (r"\cosh x - \sinh x", "e^{-x}+e^{-10x}"),
            ("i^n", "1"),
        ),
    ),
    "nothing drowns in a huge number": (
        (
            ("2^{1000000}", "4^{500000}"),
            ("20000!", r"20000\cdot 19999!"),
            (r"1-\frac{1}{2^{1000000}}", r"\frac{2^{1000000}-1}{2^{1000000}}"),
            ("(e^{1000}+1)(e^{1000}-1)", "e^{2000}-1"),
            (r"(\sqrt2\cdot10^{3000}+1)(\sqrt2\cdot10^{3000}-1)", r"2\cdot10^{6000}-1"),
            (r"10^{100}+\sqrt2-10^{100}", r"\sqrt2"),
            (r"\sin x+10^{60}+1", r"1+\sin x+10^{60}"),
            (r"y=\sin x+10^{60}", r"2y=2\sin x+2\cdot10^{60}"),
            (r"\sqrt2+(\sqrt6-\sqrt2\sqrt3)", r"\sqrt2"),
        ),
        (
            ("2^{1000000}+1", "2^{1000000}"),
            ("20000!+1", "20000!"),
            ("10^{100000}-1", "10^{100000}"),
            ("10^{10000000}+1", "10^{10000000}"),
            (r"1-\frac{1}{2^{1000000}}", "1"),
            (r"\frac{20000!+1}{20000!}", "1"),
            ("e^{1000}+1", "e^{1000}"),
            ("e^{1000000}+1", "e^{1000000}"),
            ("(e^{1000}+1)(e^{1000}-1)", "e^{2000}"),
            (r"(\sqrt2\cdot10^{3000}+1)(\sqrt2\cdot10^{3000}-1)", r"2\cdot10^{6000}"),
            ("x+10^{60}+1", "x+10^{60}"),
            ("x+2^{1000000}+1", "x+2^{1000000}"),
            (r"\sin x+10^{60}+1", r"\sin x+10^{60}"),
            (r"y=\sin x+10^{60}", r"y=\sin x+10^{60}+1"),
            (r"x\sin(1)(1+10^{-60})", r"x\sin(1)"),
            ("e^{x+10^{-50}}", "e^x"),
            (r"1.00000000000000000000000000000000000000000000000000000001\sin x", r"\sin x"),
            ("9^{9^9}", "9^{9^9}+1"),
            ("x+9^{-9^9}", "x"),
            ("2^{1/2^{1000}}", "1"),
            (r"[1,+\infty)", r"[2^{\frac{1}{2^{1000}}}, \infty)"),
            ("(x+1)^{22222222222222222222222222222222222222222}", "(x+1)^2"),
        ),
    ),
    "a name counts to its last letter": (
        (
            (r"\int_{0}^{1} x^2\,dx", r"\int_0^1 x^2 dx"),
            (r"2\int_0^1 t^2 e^{-t} dt", r"2\int_0^{1} t^2 e^{-t} dt"),
            (r"\lim_{x\to0}f(x)", r"\lim_{x \to 0} f(x)"),
            (r"\sum_x r(x)\pi_x", r"\sum_{x} r(x)\pi_x"),
            (r"\sum_{d\mid n} \mu(d)", r"\sum_{d|n}\mu(d)"),
            ("f_{123456789}(x)", "f_{123456789}(x)"),
        ),
        (
            (r"\int_0^1 t^2 e^{-t} dt", r"\int_0^{\infty} t^2 e^{-t} dt"),
            (r"\int_0^1 \sqrt{1+x^4}\,dx", r"\int_0^2 \sqrt{1+x^4}\,dx"),
            (r"\int_0^1 x^{12}dx", r"\int_0^1 x^1 2dx"),
            (r"\lim_{x\to0}f(x)", r"\lim_{x\to1}f(x)"),
            (r"\sum_x f(x)", r"\sum_y f(x)"),
            ("f_{123456789}(x)", "f_{023456789}(x)"),
            (r"\infty", r"\lim_{n \to \infty} \frac{(2n)!}{2^n (n!)^2}"),
        ),
    ),
    "words are no products of letters": (
        (
            ("P(X=k)=1/2 for k=1,2", r"P(X=k)=\frac12 \text{ for } k=1,2"),
            (r"2k\pi \text{ for } k\in\mathbb{Z}", r"2k\pi, k\in\mathbb{Z}"),
            ("x = 5 if y = 2", r"x=5\text{ if }y=2"),
            (r"C=\frac{def}{de+df}", r"C=\frac{fed}{df+ed}"),
            (r"\frac12 at^2", r"\frac{at^2}{2}"),
            ("ax+by=c", "by+ax=c"),
        ),
        (
            ("P(X=k)=1/2 for k=1,2", "P(X=k)=1/3 for k=1,2"),
            ("a_n=2 for n=1", "a_n=3 for n=1"),
            ("1 for n=2", "2 for n=1"),
            ("5 if x>0", "5"),
            ("P=1/2 if n=1", "P=1/2 if n=2"),
        ),
    ),
    "numbers and constants in text": (
        (
            (r"\text{2π cm}", r"2\pi"),
            (r"2\text{ pi}", r"2\pi"),
            (r"2\,\text{π}", r"2\pi"),
            (r"\text{2\pi cm}", r"2\pi"),
            (r"2\text{x}", "2x"),
        ),
        (
            (r"\text{2π cm}", "2"),
            (r"2\text{ pi}", "2"),
            (r"3\text{ infinity}", "3"),
            (r"2\text{ 3}", "23"),
            (r"\text{5 or 6}", "5"),
        ),
    ),
    "circled digits name statements": (
        (
            ("②③", r"\textcircled{2}\textcircled{3}"),
            ("①③", "①, ③"),
            ("①③", "③①"),
            ("①②", r"\text{①②}"),
            ("❷", "②"),
        ),
        (("②③", "23"), ("②", "2"), ("②③", "②④"), ("⑫", "12"), (r"\textcircled{1}\textcircled{3}", "②③")),
    ),
    "no group of digits begins with 0": (
        (("1,245", "1245"), ("12,000", "12000"), ("10 245", "10245"), (r"1{,}245", "1245"), (r"10\,245", "10245")),
        (
            ("0,245", "245"),
            ("0 245", "245"),
            (r"0{,}245", "245"),
            (r"0\,245", "245"),
            ("0,245", "0"),
            ("007,245", "7245"),
        ),
    ),
    "two sets are not one": (
        (
            (r"\{x\mid x>3\}", "x>3"),
            (r"\{x\mid x<1\}\cup\{x\mid x>3\}", r"x<1 \text{ or } x>3"),
            (r"\{x\mid x \ne 0\}", r"\mathbb{R}\setminus\{0\}"),
            ("x>1, x<3", "(1,3)"),
        ),
        (
            (r"\{x \mid x \geq 3\},\{x \mid x \geq 0\}", r"\{x \mid x \geq 3\}"),
            (r"\{x\mid x\ge3\},\{x\mid x\ge0\}", r"\{x\mid x\ge0\}"),
            (r"\{x\mid x\ge3\} \text{ and } \{x\mid x\ge0\}", r"\{x\mid x\ge3\}"),
            (r"A=\{x\mid x\ge3\}, B=\{x\mid x\ge0\}", r"\{x\mid x\ge3\}"),
        ),
    ),
    "left sides count": (
        (
            ("41+1 = 42", "42"),
            (_B_INVERSE, r"\begin{pmatrix}3&7\\5&12\end{pmatrix}"),
            ("f(t)=t^2", "f(x)=x^2"),
            (r"\log_{13}\sqrt{13}=\frac12", "1/2"),
            (r"\frac{\sqrt3}{3}\approx0.577", r"\frac{\sqrt3}{3}"),
            (r"x=\frac23\approx0.67", "2/3"),
            (r"1234.5 \approx 1235", "1234.5"),
        ),
        (
            ("41 = 42", "42"),
            ("41 = 42", "41"),
            ("1+1=3", "3"),
            (r"42\approx43", "42"),
            (r"42\approx43", "43"),
            (r"\pi\approx4", r"\pi"),
            (_B_INVERSE, r"C^{-3}=\begin{pmatrix}3&7\\5&12\end{pmatrix}"),
            (_B_INVERSE, r"B^{-3}=\begin{pmatrix}3&7\\5&12\end{pmatrix}"),
            ("f(2)=3", "f(5)=3"),
            ("P(A)=1/2", "P(B)=1/2"),
            (r"\angle A=30", r"\angle B=30"),
            ("S_1=5", "S_2=5"),
            (r"\text{area}=5", r"\text{perimeter}=5"),
        ),
    ),
    "roots are no point": (
        (("x_1=1, x_2=2", "(1,2)"), ("1, 2", "(1,2)"), ("x=1, y=2", "(1,2)"), ("x=1,2", "1,2")),
        (("x=1, x=2", "(1,2)"), ("x=1 or x=2", "(1,2)"), ("x=1,2", "(1,2)"), ("x=1,x=2", "[1,2]")),
    ),
    "a numeral asks for its base": (
        (("1011_2", "1011_{2}"), ("1011_2", "1011 (base 2)"), (r"A2_{16}", r"\text{A2}_{16}"), ("42_{10}", "42")),
        (("1011_2", "11"), ("1011_2", "1011"), ("1011_2", "1011_3"), ("52_8", "42"), ("-101_2", "-5")),
    ),
    "only units that exist are left away": (
        (
            ("12 red apples", "12"),
            ("3 cups of flour", "3"),
            ("42 total", "42"),
            ("5 newtons", "5"),
            (r"5\mathrm{J}", "5"),
            ("5 m/s^2", "5"),
            ("5 blorg", "5 blorg"),
            ("36个", "36"),
            ("36个苹果", "36"),
            (r"5\text{厘米}", "5 cm"),
            ("12平方米", "12 m^2"),
            ("5 ㎡", r"5\text{ m}^2"),
        ),
        (
            ("42 excluded", "42"),
            (r"42\text{ is wrong}", "42"),
            ("42 wrongly", "42"),
            ("42 hopefully", "42"),
            ("42 excludes", "42"),
            ("5 of 6", "5"),
            ("5 blorg", "5"),
            ("4 score", "4"),
            ("5厘米", "5 m"),
            ("36个", "37"),
        ),
    ),
    "subscripts, signs and doubled backslashes": (
        (
            ("v^2_0", "v_0^2"),
            ("a^{n}_{k}", "a_k^n"),
            (r"\bar{x}_1", r"\overline{x}_1"),
            (r"R_\odot^2 A", r"A R_{\odot}^{2}"),
            (r"\zeta\foo", r"\foo\zeta"),
            (r"\pi_x+1", r"1+\pi_x"),
            (r"\\frac{1}{2}+\frac13", r"\frac56"),
            (r"x \\in [0,1]", "[0,1]"),
        ),
        (
            ("v^2_0", "v_1^2"),
            (r"R_\odot", r"R_\oplus"),
            (r"A\subset B", r"B\subset A"),
            (r"\arg(2z)", r"2\arg z"),
            (r"\foo{2}\cdot 3", r"\foo{3}\cdot 2"),
            (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
        ),
    ),
    "degrees in expressions": (
        (
            (r"180^\circ-2\alpha", r"180-2\alpha"),
            (r"90^\circ-\frac{\theta}{2}", r"90-\frac\theta2"),
            (r"x=30^\circ+180^\circ k", "x=30+180k"),
            ("30°+45°", "75"),
            (r"45^\circ", r"\frac{\pi}{4}"),
        ),
        ((r"\sin 30^\circ", r"\sin 30"), (r"180^\circ-2\alpha", r"90-2\alpha"), (r"30^\circ", "31")),
    ),
    "double factorials": (
        (("10!!", "3840"), ("9!!", "945"), ("n!!(n-1)!!", "n!"), ("(3!)!", "720")),
        (("5!!", "120"), ("6!!", "720"), ("n!!", "(n!)!")),
    ),
}

STATED: tuple[tuple[str, str, bool, str], ...] = (
    *((text, "42", True, "al") for text in ("**Answer: 42**", "**Answer:** 42", "**Answer**: 42", "Answer: **42**.")),
    *((text, "42", True, "al") for text in ("***Answer: 42***", "__Answer: 42__", "`Answer: 42`", "### Answer: 42")),
    *(
        (text, "42", True, "al")
        for text in ("### Answer\n\n42", "**Answer**\n42", "**Answer:**\n42", "Answer:\n\n$$42$$")
    ),
    *(
        (text, "42", True, "al")
        for text in ("Answer:\n\\[\n42\n\\]", "Answer:\n\n$$42$$", "**Final Answer**\n\n42", "- Answer: 42")
    ),
    *((text, "42", True, "al") for text in ("> **Answer:** $42$", "<b>Answer:</b> 42", r"\textbf{Answer:} 42")),
    *(
        (text, "42", True, "al")
        for text in ("Answer：42", "ANSWER = 42", "The final answer: 42", "Final answer is: 42")
    ),
    *((text, "42", True, "al") for text in ("Answer: 42, which is the total.", "Answer: 42. This is because 40+2.")),
    *((text, "42", True, "al") for text in ("Answer: 42 because 6*7.", "Answer: 42 apples", "Answer: x = 42")),
    *((text, "42", True, "al") for text in ("答案：42", "最终答案：$42$", "*Answer:* *42*", "Final answer is: 42")),
    ("Answer: 3.5", "3.5", True, "al"),
    ("Answer: $2^{10} = 1024$", "1024", True, "al"),
    ("Answer: 2*3*x", "6x", True, "l"),
    ("Answer: a**b", "a^b", True, "l"),
    ("Answer: 41 or 42", "42", False, "al"),
    ("Answer: 42 or maybe 43", "42", False, "al"),
    ("Answer: 41\nAnswer: 42", "41", False, "al"),
    ("答案是42。", "42", True, "a"),
    ("答案为 C。", "C", True, "a"),
    ("故选：B。", "B", True, "a"),
    ("答案：x=1或x=2", "1, 2", True, "a"),
    ("答案：x=1或x=2", "2", False, "a"),
    ("因此一共有 42 个。", "42", True, "a"),
    ("答：一共有36个苹果。", "36", True, "a"),
    ("结果是 3/4 米。", "3/4", True, "a"),
    ("面积等于 12 平方厘米。", "12", True, "a"),
    ("<answer>42</answer>", "42", True, "al"),
    ("<answer> The number is 42. </answer>", "42", True, "al"),
    ("<think>x</think><answer>\n$\\frac12$\n</answer>", "1/2", True, "al"),
    ("<answer>41</answer> no <answer>42</answer>", "42", True, "al"),
    ("<answer>42", "42", False, "l"),
    ("<answer>41 or 42</answer>", "42", False, "al"),
    *((f"The answer is 72{tail}", "72", True, "a") for tail in (", which is the total.", " because 70+2=72.")),
    *(
        (f"The answer is 72{tail}", "72", True, "a")
        for tail in (" (the total).", "; hence 73 is wrong.", ", as desired.")
    ),
    ("The answer is 3, 4 and 5.", "3,4,5", True, "a"),
    ("The answer is 3 or 4.", "3", False, "a"),
    ("The answer is not 42.", "42", False, "a"),
    ("The answer is 5 million.", "5", False, "a"),
    ("The answer is 10 to 12.", "10", False, "a"),
    (r"\boxed{42", "42", False, "a"),
    (r"so \boxed{42. The answer is 42.", "42", False, "a"),
    (r"\boxed{41} and \boxed{42", "41", True, "a"),
    (r"\boxed{41 #### 42}", "42", False, "a"),
    (r"\boxed{41 #### 42}", "41", False, "a"),
    ("The value is 0,245.", "245", False, "a"),
    ("The value is 0,245.", "0", False, "a"),
    ("We get 1,245.", "1245", True, "a"),
)
